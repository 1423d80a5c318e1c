"""The RPCs over a real channel: checks, their order, sentences, types (contract 5)."""

import re
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import MessageToDict, ParseDict

from esd.endpoints.v1 import endpoints_pb2 as pb
from services.common.auth import Profile, UsernameStatus
from services.endpoints import event_store
from services.endpoints.store import EndpointStore
from tests.serving import Metadata, Tokens

BODY = {
    "endpoint_name": "test",
    "instance_type": "ml.g5.2xlarge",
    "initial_instance_count": "1",
    "autoscaling_enabled": False,
    "assign_to_roles": ["painter"],
}


async def create(stub: Any, metadata: Metadata, **changes: Any) -> dict[str, Any]:
    body = {key: value for key, value in (BODY | changes).items() if value is not ...}
    request = ParseDict(body, pb.CreateEndpointRequest())
    response = await stub.CreateEndpoint(request, metadata=metadata)
    return MessageToDict(response, always_print_fields_with_no_presence=True)["data"]


async def listed(stub: Any, metadata: Metadata, **query: str) -> dict[str, Any]:
    response = await stub.ListEndpoints(pb.ListEndpointsRequest(**query), metadata=metadata)
    return MessageToDict(response, always_print_fields_with_no_presence=True)


async def names(stub: Any, metadata: Metadata, **query: str) -> list[str]:
    return [endpoint["endpoint_name"] for endpoint in (await listed(stub, metadata, **query))["endpoints"]]


async def envelope(call: Any) -> dict[str, str]:
    await call
    return {key: value for key, value in await call.initial_metadata() if key.startswith("x-esd-")}


async def test_a_new_endpoint_is_answered_as_the_document_says(stub: Any, admin: Metadata) -> None:
    created = await create(stub, admin)
    assert re.fullmatch(r"[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}", created.pop("EndpointDeploymentJobId"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}", created.pop("startTime"))
    assert created == {
        "endpoint_name": "esd-async-test",
        "endpoint_type": "Async",
        "endpoint_status": "Creating",
        "instance_type": "ml.g5.2xlarge",
        "autoscaling": False,
        "min_instance_number": "0",
        "max_instance_number": "1",
        "current_instance_count": "0",
        "endTime": None,
        "status": None,
        "error": None,
        "owner_group_or_role": ["painter"],
        "custom_extensions": "",
    }


@pytest.mark.parametrize(("profile", "status"), [(Profile.DOCUMENT, "200"), (Profile.WEBUI, "202")])
async def test_the_status_of_a_creation_follows_the_profile(
    stub: Any, tokens: Tokens, profile: Profile, status: str
) -> None:
    metadata = tokens.user("ann", ["sagemaker_endpoint:create"], profile=profile)
    call = stub.CreateEndpoint(ParseDict(BODY, pb.CreateEndpointRequest()), metadata=metadata)
    assert await envelope(call) == {
        "x-esd-status": status,
        "x-esd-message": "Endpoint deployment started%3A esd-async-test",
        "x-esd-unwrap": "1",
    }


async def test_counts_are_echoed_as_sent_and_listed_as_text(stub: Any, admin: Metadata) -> None:
    created = await create(stub, admin, min_instance_number=1, max_instance_number="3")
    assert (created["min_instance_number"], created["max_instance_number"]) == (1, "3")
    (found,) = (await listed(stub, admin))["endpoints"]
    assert (found["min_instance_number"], found["max_instance_number"]) == ("1", "3")


async def test_an_endpoint_without_a_name_is_named_by_its_id(stub: Any, admin: Metadata) -> None:
    created = await create(stub, admin, endpoint_name="", endpoint_type="Real-time")
    assert created["endpoint_name"] == f"esd-real-time-{created['EndpointDeploymentJobId'][:7]}"


async def test_extensions_are_split_and_joined(stub: Any, admin: Metadata) -> None:
    created = await create(stub, admin, custom_extensions="https://a\nhttps://b, https://a")
    assert created["custom_extensions"] == "https://a,https://b"


REALTIME = {"endpoint_type": "Real-time", "autoscaling_enabled": True}
ASYNC = {"autoscaling_enabled": True}
REFUSED = [
    ({"endpoint_type": "Serverless"}, "Serverless endpoint is not supported yet"),
    ({"initial_instance_count": 0}, "initial_instance_count should be at least 1: test"),
    (
        {"initial_instance_count": 0, "endpoint_name": ""},
        "initial_instance_count should be at least 1: an endpoint without a name",
    ),
    ({"initial_instance_count": 0, "endpoint_type": "Serverless"}, "Serverless endpoint is not supported yet"),
    (REALTIME, "min_instance_number should be at least 1 for real-time endpoint: test"),
    (ASYNC | {"min_instance_number": "-1"}, "min_instance_number should be at least 0 for async endpoint: test"),
    (ASYNC | {"min_instance_number": 3, "max_instance_number": 2}, "max_instance_number should be at least 3: test"),
    (ASYNC | {"max_instance_number": 0}, "max_instance_number should be at least 1: test"),
    ({"initial_instance_count": 9}, "an endpoint may have at most 8 instances here (asked for: 9)"),
    ({"custom_extensions": "a b c d"}, "custom_extensions should be at most 3"),
    (
        {"custom_extensions": "a", "custom_docker_image_uri": "b"},
        "custom_extensions and custom_docker_image_uri cannot be used together",
    ),
    (
        {"min_instance_number": -1},
        "[min_instance_number: numeric instance is lower than the required minimum (minimum: 0, found: -1)]",
    ),
    (
        {"max_instance_number": "many"},
        "[max_instance_number: instance type (string) does not match any allowed primitive type "
        '(allowed: ["integer"])]',
    ),
    (
        {"max_instance_number": "--5"},
        "[max_instance_number: instance type (string) does not match any allowed primitive type "
        '(allowed: ["integer"])]',
    ),
    *(
        (
            {"min_instance_number": number},
            "[min_instance_number: numeric instance is greater than the required maximum "
            f"(maximum: 999999999, found: {found})]",
        )
        for number, found in ((1e30, "1e+30"), ("9" * 12, "1e+12"))
    ),
    (
        {"instance_type": ..., "autoscaling_enabled": ...},
        '[object has missing required properties (["autoscaling_enabled","instance_type"])]',
    ),
    (
        {"endpoint_name": "a" * 21},
        f'[endpoint_name: string "{"a" * 21}" is too long (length: 21, maximum allowed: 20)]',
    ),
    (
        {"endpoint_name": "a/b"},
        '[endpoint_name: ECMA 262 regex "^[A-Za-z0-9-]*$" does not match input string "a/b"]',
    ),
]


@pytest.mark.parametrize(("changes", "sentence"), REFUSED)
async def test_a_bad_endpoint_is_refused_with_a_sentence_and_not_kept(
    stub: Any, admin: Metadata, store: EndpointStore, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await create(stub, admin, **changes)
    assert (refused.value.code(), refused.value.details()) == (grpc.StatusCode.INVALID_ARGUMENT, sentence)
    assert await store.get_all() == []


async def test_customizing_twice_is_refused_before_the_permission_and_a_count_after_it(
    stub: Any, tokens: Tokens
) -> None:
    nobody = tokens.user("ann", ["sagemaker_endpoint:list"])
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await create(stub, nobody, custom_extensions="a", custom_docker_image_uri="b")
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await create(stub, nobody, initial_instance_count=0)
    assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED
    expected = "User ann has no permissions: ['sagemaker_endpoint:all', 'sagemaker_endpoint:create']"
    assert refused.value.details() == expected


async def test_a_role_owns_one_live_endpoint_of_any_type(stub: Any, admin: Metadata) -> None:
    await create(stub, admin, assign_to_roles=["painter", "poet"])
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await create(stub, admin, endpoint_name="b", endpoint_type="Real-time", assign_to_roles=["dancer", "poet"])
    assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert refused.value.details() == "role [poet] has a valid endpoint already, not allow to have another one"


async def test_a_name_in_use_is_refused(stub: Any, admin: Metadata) -> None:
    await create(stub, admin)
    with pytest.raises(grpc.aio.AioRpcError, match="Cannot create already existing model") as refused:
        await create(stub, admin, assign_to_roles=["poet"])
    assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION


async def test_a_deleted_endpoint_leaves_list_name_and_role_at_once(stub: Any, admin: Metadata) -> None:
    await create(stub, admin)
    request = pb.DeleteEndpointsRequest(endpoint_name_list=["esd-async-test", "esd-async-unknown"])
    assert (await envelope(stub.DeleteEndpoints(request, metadata=admin)))["x-esd-raw"] == "1"
    assert await names(stub, admin) == []
    await create(stub, admin)
    assert await names(stub, admin) == ["esd-async-test"]


async def test_the_webui_client_deletes_without_a_username_and_gets_204(stub: Any, tokens: Tokens) -> None:
    anonymous = tokens.user("api", [], profile=Profile.WEBUI, username_status=UsernameStatus.ABSENT, impersonate=True)
    request = pb.DeleteEndpointsRequest(endpoint_name_list=["esd-async-test"])
    assert (await envelope(stub.DeleteEndpoints(request, metadata=anonymous)))["x-esd-status"] == "204"


@pytest.fixture
async def three(stub: Any, admin: Metadata) -> list[str]:
    """The names of three endpoints, newest first."""
    for role in ("painter", "sculptor", "poet"):
        await create(stub, admin, endpoint_name=role, assign_to_roles=[role])
    return ["esd-async-poet", "esd-async-sculptor", "esd-async-painter"]


async def test_a_list_is_paged_newest_first_with_an_opaque_key(stub: Any, admin: Metadata, three: list[str]) -> None:
    first = await listed(stub, admin, limit="2")
    second = await listed(stub, admin, limit="2", exclusive_start_key=first["last_evaluated_key"])
    assert [endpoint["endpoint_name"] for endpoint in first["endpoints"] + second["endpoints"]] == three
    assert second["last_evaluated_key"] is None
    for limit in ("", "0", "-1", "3"):
        assert await names(stub, admin, limit=limit) == three


async def test_a_list_finds_one_endpoint_by_its_id(stub: Any, admin: Metadata, three: list[str]) -> None:
    found = (await listed(stub, admin))["endpoints"][1]
    assert (await listed(stub, admin, endpoint_id=found["EndpointDeploymentJobId"]))["endpoints"] == [found]
    assert await names(stub, admin, endpoint_id="none") == []


async def test_who_may_only_list_sees_what_the_user_of_the_query_may_use(
    stub: Any, admin: Metadata, tokens: Tokens, three: list[str]
) -> None:
    lister = tokens.user("bob", ["sagemaker_endpoint:list"], ["sculptor"])
    assert await names(stub, lister) == []
    assert await names(stub, lister, username="bob") == ["esd-async-sculptor"]
    assert await names(stub, lister, username="bob", limit="1") == ["esd-async-sculptor"]
    assert await names(stub, admin, username="bob") == three


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ({"username": "eve"}, 'user: "eve" not exist'),
        ({"limit": "few"}, 'limit "few" is not a number'),
        ({"exclusive_start_key": "!"}, 'exclusive_start_key "!" is malformed'),
        ({"exclusive_start_key": "e30="}, 'exclusive_start_key "e30=" is malformed'),
        ({"exclusive_start_key": "é"}, 'exclusive_start_key "é" is malformed'),
    ],
)
async def test_a_bad_query_is_refused(stub: Any, admin: Metadata, query: dict[str, str], sentence: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await listed(stub, admin, **query)
    assert (refused.value.code(), refused.value.details()) == (grpc.StatusCode.INVALID_ARGUMENT, sentence)


async def test_a_job_finds_usable_endpoints_of_its_type_and_a_pinned_one_in_any_state(
    stub: Any, admin: Metadata, store: EndpointStore, service_token: Callable[[str], Metadata]
) -> None:
    created = await create(stub, admin)
    service = service_token("inference")

    async def find(**request: Any) -> list[str]:
        response = await stub.FindEndpoints(pb.FindEndpointsRequest(**request), metadata=service)
        return [f"{endpoint.endpoint_name} {endpoint.endpoint_status}" for endpoint in response.endpoints]

    assert await find(inference_type="Async", username="ann", roles=["painter"]) == []
    assert await find(endpoint_name="esd-async-test") == ["esd-async-test Creating"]
    await store.set_in_service(created["EndpointDeploymentJobId"], (await store.get_all())[0].start_time)
    usable = ["esd-async-test InService"]
    assert await find(inference_type="Async", username="ann", roles=["poet", "painter"]) == usable
    assert await find(inference_type="Async", username="painter") == usable
    assert await find(inference_type="Async", username="bob", roles=["poet"]) == []
    assert await find(inference_type="Real-time", username="ann", roles=["painter"]) == []
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.FindEndpoints(pb.FindEndpointsRequest(), metadata=admin)
    assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED


async def update(stub: Any, metadata: Metadata, endpoint_id: str, **change: Any) -> dict[str, Any]:
    request = ParseDict({"endpoint_id": endpoint_id, "body": change}, pb.UpdateEndpointRequest())
    return MessageToDict((await stub.UpdateEndpoint(request, metadata=metadata)).data)


async def events(stub: Any, metadata: Metadata, endpoint_id: str, **query: str) -> dict[str, Any]:
    request = pb.ListEndpointEventsRequest(endpoint_id=endpoint_id, **query)
    return MessageToDict(await stub.ListEndpointEvents(request, metadata=metadata))


async def test_bounds_are_changed_one_by_one(stub: Any, admin: Metadata) -> None:
    endpoint_id = (await create(stub, admin))["EndpointDeploymentJobId"]
    changed = await update(stub, admin, endpoint_id, autoscaling_enabled=True, max_instance_number="4")
    assert (changed["autoscaling"], changed["min_instance_number"], changed["max_instance_number"]) == (True, "0", "4")
    changed = await update(stub, admin, endpoint_id, min_instance_number=2)
    assert (changed["autoscaling"], changed["min_instance_number"], changed["max_instance_number"]) == (True, "2", "4")
    assert (await listed(stub, admin))["endpoints"][0]["min_instance_number"] == "2"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {},
            "nothing to change: give autoscaling_enabled, min_instance_number, max_instance_number, "
            "pinned_checkpoints or drain",
        ),
        (
            {"pinned_checkpoints": ["x.ckpt", "y"]},
            "checkpoint with name x.ckpt is not found checkpoint with name y is not found",
        ),
        (
            {"pinned_checkpoints": ["for-all.safetensors", 7]},
            "[pinned_checkpoints: a list of names of files is expected]",
        ),
        ({"pinned_checkpoints": ["1", "2", "3", "4", "5"]}, "pinned_checkpoints may have at most 4 names (given: 5)"),
        ({"min_instance_number": 2}, "max_instance_number should be at least 2: esd-async-test"),
        ({"min_instance_number": "-1"}, "min_instance_number should be at least 0 for async endpoint: esd-async-test"),
        ({"max_instance_number": 9}, "an endpoint may have at most 8 instances here (asked for: 9)"),
    ],
)
async def test_a_bad_change_is_refused_and_changes_nothing(
    stub: Any, admin: Metadata, change: dict[str, Any], sentence: str
) -> None:
    created = await create(stub, admin, autoscaling_enabled=True)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await update(stub, admin, created["EndpointDeploymentJobId"], **change)
    assert (refused.value.code(), refused.value.details()) == (grpc.StatusCode.INVALID_ARGUMENT, sentence)
    assert (await listed(stub, admin))["endpoints"] == [created]


async def test_checkpoints_are_pinned_that_who_pins_them_may_use(
    stub: Any, admin: Metadata, tokens: Tokens, store: EndpointStore
) -> None:
    created = await create(stub, admin)
    endpoint_id = created["EndpointDeploymentJobId"]
    assert "pinned_checkpoints" not in created
    names = ["for-painters.ckpt", "for-all.safetensors"]
    changed = await update(stub, admin, endpoint_id, pinned_checkpoints=[*names, names[0]])
    assert changed["pinned_checkpoints"] == names
    poet = tokens.user("bob", ["sagemaker_endpoint:all"], ["poet"])
    with pytest.raises(grpc.aio.AioRpcError, match=r"checkpoint with name for-painters\.ckpt is not found"):
        await update(stub, poet, endpoint_id, pinned_checkpoints=names)
    assert (await store.get_live(endpoint_id)).pinned == names
    assert "pinned_checkpoints" not in await update(stub, admin, endpoint_id, pinned_checkpoints=[])


async def test_a_failed_endpoint_is_not_changed_and_an_unknown_one_not_found(
    stub: Any, admin: Metadata, store: EndpointStore
) -> None:
    endpoint_id = (await create(stub, admin))["EndpointDeploymentJobId"]
    await store.set_failed(endpoint_id, "no CUDA here")
    assert (await listed(stub, admin))["endpoints"][0]["error"] == "no CUDA here"
    with pytest.raises(grpc.aio.AioRpcError, match="has failed; delete it and create another one") as refused:
        await update(stub, admin, endpoint_id, drain=True)
    assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    await stub.DeleteEndpoints(pb.DeleteEndpointsRequest(endpoint_name_list=["esd-async-test"]), metadata=admin)
    for call in (update(stub, admin, endpoint_id, drain=True), events(stub, admin, endpoint_id)):
        with pytest.raises(grpc.aio.AioRpcError, match=f"endpoint with id {endpoint_id} is not found") as refused:
            await call
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND


async def test_a_drained_endpoint_takes_no_jobs_and_is_as_before_when_brought_back(
    stub: Any, admin: Metadata, service_token: Callable[[str], Metadata], store: EndpointStore
) -> None:
    endpoint_id = (await create(stub, admin))["EndpointDeploymentJobId"]
    assert (await update(stub, admin, endpoint_id, drain=True))["endpoint_status"] == "Draining"
    assert (await update(stub, admin, endpoint_id, drain=False))["endpoint_status"] == "Creating"
    await store.set_in_service(endpoint_id, (await store.get_all())[0].start_time)
    await update(stub, admin, endpoint_id, drain=True)
    request = pb.FindEndpointsRequest(inference_type="Async", username="ann", roles=["painter"])
    assert not (await stub.FindEndpoints(request, metadata=service_token("inference"))).endpoints
    assert (await update(stub, admin, endpoint_id, drain=False))["endpoint_status"] == "Updating"
    assert (await stub.FindEndpoints(request, metadata=service_token("inference"))).endpoints


async def test_events_tell_what_was_done_newest_first_in_pages_and_are_bounded(
    stub: Any, admin: Metadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_store, "MAX_EVENTS", 20)
    endpoint_id = (await create(stub, admin))["EndpointDeploymentJobId"]
    await update(stub, admin, endpoint_id, max_instance_number=4, drain=True)
    first = await events(stub, admin, endpoint_id, limit="1")
    second = await events(stub, admin, endpoint_id, exclusive_start_key=first["last_evaluated_key"])
    assert [(event["type"], event["message"]) for event in first["events"] + second["events"]] == [
        ("Updated", "by ann: num_max 1 -> 4, status Creating -> Draining"),
        ("Created", "asked for by ann"),
    ]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}", first["events"][0]["time"])
    assert second["last_evaluated_key"] is None
    for number in range(event_store.MAX_EVENTS):
        await update(stub, admin, endpoint_id, max_instance_number=number % 2 + 1)
    kept = (await events(stub, admin, endpoint_id, limit="0"))["events"]
    assert len(kept) == event_store.MAX_EVENTS
    assert {event["type"] for event in kept} == {"Updated"}


async def test_who_may_only_list_sees_the_events_of_endpoints_of_their_roles_and_changes_none(
    stub: Any, admin: Metadata, tokens: Tokens
) -> None:
    endpoint_id = (await create(stub, admin))["EndpointDeploymentJobId"]
    painter = tokens.user("bob", ["sagemaker_endpoint:list"], ["painter"])
    poet = tokens.user("bob", ["sagemaker_endpoint:list"], ["poet"])
    assert (await events(stub, painter, endpoint_id))["events"]
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await events(stub, poet, endpoint_id)
    assert refused.value.code() == grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await update(stub, painter, endpoint_id, drain=True)
    assert refused.value.details() == "User bob has no permissions: ['sagemaker_endpoint:all']"
