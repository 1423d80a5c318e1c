"""What every RPC has in common, shown on servicers of our own protos: a real server, a real stub, real tokens."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import unquote

import grpc
import pytest
from google.protobuf.struct_pb2 import Value
from grpc_health.v1 import health_pb2, health_pb2_grpc

from esd.endpoints.v1 import endpoints_pb2, endpoints_pb2_grpc
from esd.identity.v1 import identity_pb2 as pb
from esd.identity.v1 import identity_pb2_grpc
from esd.inference.v1 import inference_pb2, inference_pb2_grpc
from gateway.__main__ import MAX_RESPONSE_BYTES
from services.common import errors, streams
from services.common.auth import Caller, Kind, Profile, UsernameStatus, current_caller
from services.common.interceptor import INTERNAL, MAX_ANSWER_BYTES
from services.common.rpc_errors import STATUS_OF
from services.common.server import MAX_MESSAGE_BYTES, Server
from services.common.status import set_reply
from services.common.structs import list_value
from services.common.validation import MAX_STRUCTURE_BYTES
from tests.serving import Tokens

GOOD_ROLE = pb.CreateRoleRequest(role_name="r", permissions=["role:all"])


class Subject(identity_pb2_grpc.IdentityServiceServicer):
    """Answers CreateRole with whatever the test wants to happen."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.reply: tuple[int | None, str | None] | None = None
        self.seen: Caller | None = None

    async def CreateRole(self, request: pb.CreateRoleRequest, context: Any) -> pb.CreateRoleResponse:
        self.seen = current_caller()
        if self.error is not None:
            raise self.error
        if self.reply is not None:
            set_reply(*self.reply)
        return pb.CreateRoleResponse()

    async def Ping(self, request: pb.PingRequest, context: Any) -> pb.PingResponse:
        return pb.PingResponse()

    async def ListApiKeys(self, request: pb.ListApiKeysRequest, context: Any) -> pb.ListApiKeysResponse:
        return pb.ListApiKeysResponse(keys=[pb.ApiKey(prefix="x" * int(request.username))])

    async def IssueToken(self, request: pb.IssueTokenRequest, context: Any) -> pb.IssueTokenResponse:
        return pb.IssueTokenResponse(token="t")

    async def GetUser(self, request: pb.GetUserRequest, context: Any) -> pb.GetUserResponse:
        return pb.GetUserResponse(username=current_caller().name)

    async def DeleteSecret(self, request: pb.DeleteSecretRequest, context: Any) -> pb.DeleteSecretResponse:
        raise NotImplementedError


@pytest.fixture
def subject() -> Subject:
    return Subject()


@pytest.fixture
async def channel(serve: Any, subject: Subject) -> Any:
    return await serve(lambda server: identity_pb2_grpc.add_IdentityServiceServicer_to_server(subject, server))


@pytest.fixture
def stub(channel: Any) -> Any:
    return identity_pb2_grpc.IdentityServiceStub(channel)


async def _failure(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call
    return failure.value.code(), failure.value.details() or ""


def test_every_kind_of_error_has_a_status_of_its_own() -> None:
    assert set(STATUS_OF) == set(errors.EsdError.__subclasses__())
    assert len(set(STATUS_OF.values())) == len(STATUS_OF)


@pytest.mark.parametrize("kind", STATUS_OF)
async def test_an_error_of_the_domain_becomes_its_status_with_its_sentence(
    stub: Any, subject: Subject, user_token: Any, kind: type[errors.EsdError]
) -> None:
    class RoleTrouble(kind):  # type: ignore[misc, valid-type]
        """Subclasses take the status of their kind."""

    subject.error = RoleTrouble("röle 1 is troubled")
    failure = await _failure(stub.CreateRole(GOOD_ROLE, metadata=user_token("ann", ["role:all"])))
    assert failure == (STATUS_OF[kind], "röle 1 is troubled")


async def test_a_sentence_with_what_is_no_text_ends_the_call_too(stub: Any, subject: Subject, user_token: Any) -> None:
    subject.error = errors.InvalidArgument("\ud800 is half of a pair")
    failure = await _failure(stub.CreateRole(GOOD_ROLE, metadata=user_token("ann", ["role:all"])))
    assert failure == (grpc.StatusCode.INVALID_ARGUMENT, r"\ud800 is half of a pair")


@pytest.mark.parametrize("error", [RuntimeError("a detail"), KeyError("a detail"), errors.EsdError("a detail")])
async def test_an_unknown_error_reveals_nothing(stub: Any, subject: Subject, user_token: Any, error: Exception) -> None:
    subject.error = error
    failure = await _failure(stub.CreateRole(GOOD_ROLE, metadata=user_token("ann", ["role:all"])))
    assert failure == (grpc.StatusCode.INTERNAL, INTERNAL)


async def test_what_is_not_built_yet_says_so(stub: Any, service_token: Any, user_token: Any) -> None:
    expected = (grpc.StatusCode.UNIMPLEMENTED, "not implemented yet")
    request = pb.DeleteSecretRequest(caller="CALLER_WORKER", subject="8c2ee8c5-7a4e-4c0b-a1c4-2f0d3a3f0f5e")
    assert await _failure(stub.DeleteSecret(request, metadata=service_token("endpoints"))) == expected
    generated = stub.ListRoles(pb.ListRolesRequest(), metadata=user_token("ann", ["role:all"]))
    assert await _failure(generated) == expected, "also a method that the servicer does not define"


async def test_without_a_valid_token_nothing_answers_but_what_is_public(stub: Any, tokens: Tokens) -> None:
    unauthenticated = grpc.StatusCode.UNAUTHENTICATED
    caller = Caller(Kind.USER, "ann", permissions=["role:all"])
    worthless = [
        (),
        (("x-esd-token", "x"),),
        Tokens().of(caller),  # another key pair's
        tokens.of(caller, audience="inference"),
        tokens.of(Caller(Kind.SERVICE, "endpoints"), lifetime_seconds=-10),
    ]
    for metadata in worthless:
        assert (await _failure(stub.CreateRole(GOOD_ROLE, metadata=metadata)))[0] == unauthenticated
        assert (await _failure(stub.Ping(pb.PingRequest(), metadata=metadata)))[0] == unauthenticated
    assert (await stub.IssueToken(pb.IssueTokenRequest(secret="s"))).token == "t"


async def test_the_request_is_judged_before_the_user(stub: Any, user_token: Any) -> None:
    nobody = user_token("x", username_status=UsernameStatus.UNKNOWN)
    bad, good = pb.CreateRoleRequest(), GOOD_ROLE
    for metadata in (nobody, user_token("ann")):
        code, details = await _failure(stub.CreateRole(bad, metadata=metadata))
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert details == '[object has missing required properties (["permissions","role_name"])]'
    assert await _failure(stub.CreateRole(good, metadata=nobody)) == (
        grpc.StatusCode.UNAUTHENTICATED,
        "Unauthorized",
    )
    assert await _failure(stub.CreateRole(good, metadata=user_token("ann"))) == (
        grpc.StatusCode.PERMISSION_DENIED,
        "User ann has no permissions: ['role:all', 'role:create']",
    )


async def test_each_rpc_is_open_to_its_kind_of_caller_only(
    stub: Any, user_token: Any, service_token: Any, tokens: Tokens
) -> None:
    get = pb.GetUserRequest(username="x")
    assert (await stub.GetUser(get, metadata=service_token("models"))).username == "models"
    denied = grpc.StatusCode.PERMISSION_DENIED
    assert (await _failure(stub.GetUser(get, metadata=user_token("ann", ["user:all"]))))[0] == denied
    assert (await _failure(stub.CreateRole(GOOD_ROLE, metadata=service_token("models"))))[0] == denied
    worker = tokens.of(Caller(Kind.WORKER, "w"), "esd")
    assert (await _failure(stub.Ping(pb.PingRequest(), metadata=worker)))[0] == denied


async def test_the_servicer_sees_the_caller(stub: Any, subject: Subject, user_token: Any) -> None:
    await stub.CreateRole(GOOD_ROLE, metadata=user_token("änn", ["role:all"], ["r"], profile=Profile.WEBUI))
    assert subject.seen == Caller(Kind.USER, "änn", ["r"], ["role:all"], Profile.WEBUI, key_owner="änn")


async def test_the_envelope_is_the_protos_unless_the_servicer_varies_it(
    stub: Any, subject: Subject, user_token: Any
) -> None:
    ann = user_token("ann", ["role:all"])
    for reply, expected in [
        (None, ("201", "role created")),
        ((None, "grün & gut"), ("201", "grün & gut")),
        ((201, None), ("201", "role created")),
        (None, ("201", "role created")),
    ]:
        subject.reply = reply
        metadata = dict(await stub.CreateRole(GOOD_ROLE, metadata=ann).initial_metadata())
        assert (metadata["x-esd-status"], unquote(metadata["x-esd-message"])) == expected
        assert metadata["x-esd-message"].isascii()
        assert "x-esd-raw" not in metadata


async def test_a_servicer_chooses_only_among_the_statuses_of_the_proto(
    stub: Any, subject: Subject, user_token: Any
) -> None:
    subject.reply = (202, None)
    creating = stub.CreateRole(GOOD_ROLE, metadata=user_token("ann", ["role:all"]))
    assert await _failure(creating) == (grpc.StatusCode.INTERNAL, INTERNAL)


async def test_an_rpc_without_a_rest_route_says_nothing_of_an_envelope(stub: Any) -> None:
    metadata = dict(await stub.IssueToken(pb.IssueTokenRequest(secret="s")).initial_metadata())
    assert not metadata.keys() & {"x-esd-status", "x-esd-message"}


class Endpoints(endpoints_pb2_grpc.EndpointsServiceServicer):
    """Has answers whose envelope differs by profile."""

    async def CreateEndpoint(self, request: Any, context: Any) -> endpoints_pb2.CreateEndpointResponse:
        return endpoints_pb2.CreateEndpointResponse(data=endpoints_pb2.Endpoint())

    async def DeleteEndpoints(self, request: Any, context: Any) -> endpoints_pb2.DeleteEndpointsResponse:
        return endpoints_pb2.DeleteEndpointsResponse()


@pytest.fixture
async def endpoints(serve: Any) -> Any:
    channel = await serve(lambda server: endpoints_pb2_grpc.add_EndpointsServiceServicer_to_server(Endpoints(), server))
    return endpoints_pb2_grpc.EndpointsServiceStub(channel)


CREATE_ENDPOINT = endpoints_pb2.CreateEndpointRequest(
    instance_type="any", initial_instance_count=1, autoscaling_enabled=False, assign_to_roles=["r"]
)
DELETE_ENDPOINTS = endpoints_pb2.DeleteEndpointsRequest(endpoint_name_list=["e"])


async def test_the_status_follows_the_profile(endpoints: Any, user_token: Any) -> None:
    for profile, created, deleted in ((Profile.DOCUMENT, "200", "200"), (Profile.WEBUI, "202", "204")):
        ann = user_token("ann", ["sagemaker_endpoint:all"], profile=profile)
        metadata = dict(await endpoints.CreateEndpoint(CREATE_ENDPOINT, metadata=ann).initial_metadata())
        assert metadata["x-esd-status"] == created
        metadata = dict(await endpoints.DeleteEndpoints(DELETE_ENDPOINTS, metadata=ann).initial_metadata())
        assert metadata["x-esd-status"] == deleted
    assert metadata["x-esd-message"] == "Endpoints Deleted"


async def test_a_payload_in_a_field_named_data_is_to_be_unwrapped_and_a_raw_one_left(
    endpoints: Any, user_token: Any
) -> None:
    ann = user_token("ann", ["sagemaker_endpoint:all"])
    metadata = dict(await endpoints.CreateEndpoint(CREATE_ENDPOINT, metadata=ann).initial_metadata())
    assert metadata["x-esd-unwrap"] == "1"
    assert "x-esd-raw" not in metadata
    metadata = dict(await endpoints.DeleteEndpoints(DELETE_ENDPOINTS, metadata=ann).initial_metadata())
    assert metadata["x-esd-raw"] == "1"


async def test_who_names_nobody_in_webui_passes_only_where_the_rpc_allows_it(endpoints: Any, user_token: Any) -> None:
    absent = {"profile": Profile.WEBUI, "username_status": UsernameStatus.ABSENT}
    anonymous = user_token("api", impersonate=True, **absent)
    assert await endpoints.DeleteEndpoints(DELETE_ENDPOINTS, metadata=anonymous) is not None
    plain = user_token("ann", **absent)
    deleting = endpoints.DeleteEndpoints(DELETE_ENDPOINTS, metadata=plain)
    assert (await _failure(deleting))[0] == grpc.StatusCode.PERMISSION_DENIED
    listing = endpoints.ListEndpoints(endpoints_pb2.ListEndpointsRequest(), metadata=anonymous)
    assert (await _failure(listing))[0] == grpc.StatusCode.UNAUTHENTICATED


async def test_an_rpc_enforced_by_its_servicer_still_needs_a_token(endpoints: Any, user_token: Any) -> None:
    assert (await endpoints.CreateEndpoint(CREATE_ENDPOINT, metadata=user_token("ann"))).HasField("data")
    assert (await _failure(endpoints.CreateEndpoint(CREATE_ENDPOINT)))[0] == grpc.StatusCode.UNAUTHENTICATED


class Queue(inference_pb2_grpc.QueueServiceServicer):
    """Has both kinds of stream."""

    async def WatchPools(self, request: Any, context: Any) -> AsyncIterator[inference_pb2.WatchPoolsResponse]:
        yield inference_pb2.WatchPoolsResponse()
        raise errors.Unavailable(f"no more for {current_caller().name}")

    async def Work(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[inference_pb2.WorkResponse]:
        async for _ in requests:
            yield inference_pb2.WorkResponse()
        raise RuntimeError("a detail")


async def test_streams_have_the_same_door_and_the_same_errors(
    serve: Any, service_token: Any, worker_token: Any
) -> None:
    channel = await serve(
        lambda server: inference_pb2_grpc.add_QueueServiceServicer_to_server(Queue(), server), "inference"
    )
    stub: Any = inference_pb2_grpc.QueueServiceStub(channel)
    watching = stub.WatchPools(inference_pb2.WatchPoolsRequest(), metadata=service_token("endpoints"))
    assert await watching.read() == inference_pb2.WatchPoolsResponse()
    assert await _failure(watching.read()) == (grpc.StatusCode.UNAVAILABLE, "no more for endpoints")

    working = stub.Work(metadata=worker_token("an endpoint"))
    for _ in range(2):
        await working.write(inference_pb2.WorkRequest())
        assert await working.read() == inference_pb2.WorkResponse()
    await working.done_writing()
    assert await _failure(working.read()) == (grpc.StatusCode.INTERNAL, INTERNAL)

    foreign = stub.Work(metadata=service_token("endpoints"))
    assert (await _failure(foreign.read()))[0] == grpc.StatusCode.PERMISSION_DENIED
    unknown = stub.WatchPools(inference_pb2.WatchPoolsRequest())
    assert (await _failure(unknown.read()))[0] == grpc.StatusCode.UNAUTHENTICATED


async def test_health_answers_without_a_token(serve: Any) -> None:
    channel = await serve(lambda server: None)
    response = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert response.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_server_that_stops_lets_calls_end(tokens: Tokens, subject: Subject) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    class Slow(Subject):
        async def Ping(self, request: pb.PingRequest, context: Any) -> pb.PingResponse:
            begun.set()
            await go_on.wait()
            return pb.PingResponse()

    server = Server("127.0.0.1:0", tokens.verifier())
    identity_pb2_grpc.add_IdentityServiceServicer_to_server(Slow(), server.grpc)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{await server.start()}") as channel:
        call = identity_pb2_grpc.IdentityServiceStub(channel).Ping(pb.PingRequest(), metadata=tokens.user("ann"))
        await begun.wait()
        stopping = asyncio.create_task(server.stop(60))
        await server.stopping.wait()
        go_on.set()
        assert await call == pb.PingResponse()
        await stopping


async def test_an_address_in_use_stops_the_process_by_name(tokens: Tokens) -> None:
    first = Server("127.0.0.1:0", tokens.verifier())
    port = await first.start()
    with pytest.raises(SystemExit, match=f"ESD_LISTEN=127.0.0.1:{port}"):
        await Server(f"127.0.0.1:{port}", tokens.verifier()).start()
    await first.stop(0)


async def test_a_request_that_is_no_message_is_the_callers_mistake(
    serve: Any, subject: Subject, user_token: Any
) -> None:
    channel = await serve(lambda server: identity_pb2_grpc.add_IdentityServiceServicer_to_server(subject, server))
    create = channel.unary_unary("/esd.identity.v1.IdentityService/CreateRole")
    assert (await _failure(create(b"\xff", metadata=user_token())))[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert (await _failure(create(b"\xff")))[0] is grpc.StatusCode.UNAUTHENTICATED, "a bad token comes first"


class OpenQueue(inference_pb2_grpc.QueueServiceServicer):
    """Says one thing and keeps the stream open."""

    async def WatchPools(self, request: Any, context: Any) -> AsyncIterator[inference_pb2.WatchPoolsResponse]:
        yield inference_pb2.WatchPoolsResponse()
        await asyncio.Event().wait()


async def _watch(server: Server, metadata: Any) -> tuple[grpc.StatusCode, str | None]:
    """How a stream of the server ends."""
    inference_pb2_grpc.add_QueueServiceServicer_to_server(OpenQueue(), server.grpc)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{await server.start()}") as channel:
        stream = inference_pb2_grpc.QueueServiceStub(channel).WatchPools(
            inference_pb2.WatchPoolsRequest(), metadata=metadata
        )
        assert await stream.read() == inference_pb2.WatchPoolsResponse()
        ended = await _failure(stream.read())
    await server.stop(0)
    return ended


async def test_without_a_review_a_stream_ends_with_its_token(tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "REVIEW_SECONDS", 0.05)
    metadata = tokens.of(Caller(Kind.SERVICE, "endpoints"), lifetime_seconds=2)
    ended = await _watch(Server("127.0.0.1:0", tokens.verifier()), metadata)
    assert ended == (grpc.StatusCode.UNAUTHENTICATED, streams.ENDED)


async def test_a_stream_goes_on_while_nobody_can_review_it(tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "REVIEW_SECONDS", 0.05)
    verdicts: list[bool | None] = [True, None, None, True, False]
    asked = []

    async def review(tokens: Any) -> list[bool]:
        asked.append(tokens)
        verdict = verdicts[len(asked) - 1]
        if verdict is None:
            raise errors.Unavailable("identity is away")
        return [verdict]

    metadata = tokens.service("endpoints")
    ended = await _watch(Server("127.0.0.1:0", tokens.verifier(), review), metadata)
    assert ended == (grpc.StatusCode.UNAUTHENTICATED, streams.ENDED)
    assert asked == [[metadata[0][1]]] * 5


class Flood(inference_pb2_grpc.QueueServiceServicer):
    """Says one thing after the other, as long as somebody listens."""

    async def WatchPools(self, request: Any, context: Any) -> AsyncIterator[inference_pb2.WatchPoolsResponse]:
        pool = inference_pb2.Pool(worker_ids=["w" * 1_000_000])
        while True:
            yield inference_pb2.WatchPoolsResponse(pools=[pool])


async def test_a_client_that_does_not_read_cannot_keep_other_streams_open(
    tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "REVIEW_SECONDS", 0.05)
    holds = True

    async def review(tokens: Any) -> list[bool]:
        return [holds] * len(tokens)

    server = Server("127.0.0.1:0", tokens.verifier(), review)
    inference_pb2_grpc.add_QueueServiceServicer_to_server(Flood(), server.grpc)
    target = f"127.0.0.1:{await server.start()}"
    metadata = tokens.service("endpoints")
    # A connection each: on a common one a client that reads would wait for the one that does not.
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with (
        grpc.aio.insecure_channel(target, options) as deaf,
        grpc.aio.insecure_channel(target, options) as other,
    ):
        request = inference_pb2.WatchPoolsRequest()
        silent = inference_pb2_grpc.QueueServiceStub(deaf).WatchPools(request, metadata=metadata)
        await silent.read()
        stream = inference_pb2_grpc.QueueServiceStub(other).WatchPools(request, metadata=metadata)
        await stream.read()
        holds = False

        async def all_of_it() -> None:
            while True:
                await stream.read()

        assert (await _failure(all_of_it())) == (grpc.StatusCode.UNAUTHENTICATED, streams.ENDED)
    await server.stop(0)


async def test_an_answer_that_is_too_large_for_json_is_refused_in_words(stub: Any, user_token: Any) -> None:
    metadata = user_token("ann", ["user:all"])
    assert (await stub.ListApiKeys(pb.ListApiKeysRequest(username="4000000"), metadata=metadata)).keys
    request = pb.ListApiKeysRequest(username=str(MAX_ANSWER_BYTES + 1))
    code, sentence = await _failure(stub.ListApiKeys(request, metadata=metadata))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert sentence == "the answer would have 16 MiB, 16 are possible: ask for fewer at once"
    assert MAX_RESPONSE_BYTES >= 6 * MAX_ANSWER_BYTES, "what the gateway takes, should JSON write each byte as six"


async def test_a_request_that_nobody_needs_so_large_is_not_read(stub: Any, user_token: Any) -> None:
    """It would be read into memory before anybody looks at its token."""
    request = pb.PingRequest.FromString(b"\xfa\x07" + _varint(MAX_MESSAGE_BYTES) + bytes(MAX_MESSAGE_BYTES))
    assert (await _failure(stub.Ping(request, metadata=user_token("ann"))))[0] == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_request_may_be_large_by_its_texts_alone(stub: Any, user_token: Any, service_token: Any) -> None:
    """A list of a megabyte of empty ones would keep the service from everybody else for many seconds."""
    metadata = user_token("ann", ["user:all", "role:all"])
    for permissions in (list_value([[]] * (MAX_STRUCTURE_BYTES // 4)), list_value(["x" * MAX_STRUCTURE_BYTES])):
        request = pb.CreateUserRequest(username="u", password="p", permissions=Value(list_value=permissions))
        code, sentence = await _failure(stub.CreateUser(request, metadata=metadata))
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert sentence == "[the request has more than 512 KiB of objects and lists, which is not possible here]"
    large = "é" * MAX_STRUCTURE_BYTES
    code, _ = await _failure(stub.ListRoles(pb.ListRolesRequest(role=large), metadata=metadata))
    assert code == grpc.StatusCode.UNIMPLEMENTED
    code, _ = await _failure(
        stub.ReviewTokens(pb.ReviewTokensRequest(tokens=[large]), metadata=service_token("endpoints"))
    )
    assert code == grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("end", [b"", b"\x0b", b"\x0f", b"\x08", b"\x08" + b"\xff" * 20, b"\x0a\xff\xff\xff\x7f"])
async def test_a_large_request_that_is_no_message_is_refused(channel: Any, user_token: Any, end: bytes) -> None:
    text = bytes(MAX_STRUCTURE_BYTES)
    call = channel.unary_unary("/esd.identity.v1.IdentityService/CreateUser")
    code, _ = await _failure(call(b"\x0a" + _varint(len(text)) + text + end, metadata=user_token("ann", ["user:all"])))
    assert code == grpc.StatusCode.INVALID_ARGUMENT


def _varint(number: int) -> bytes:
    head = bytearray()
    while number > 127:
        head.append(number & 127 | 128)
        number >>= 7
    return bytes([*head, number])


async def test_nothing_is_unpacked(stub: Any, user_token: Any) -> None:
    metadata = user_token("ann", ["role:all"])
    for algorithm in (grpc.Compression.Gzip, grpc.Compression.Deflate):
        code, sentence = await _failure(stub.Ping(pb.PingRequest(), metadata=metadata, compression=algorithm))
        assert code == grpc.StatusCode.UNIMPLEMENTED, sentence
    assert await stub.Ping(pb.PingRequest(), metadata=metadata) == pb.PingResponse()


async def test_a_chore_that_fails_takes_the_server_with_it_and_the_others_are_ended(tokens: Tokens) -> None:
    ended = asyncio.Event()

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def failing() -> None:
        raise OSError("the disk is full")

    server = Server("127.0.0.1:0", tokens.verifier())
    with pytest.raises(OSError, match="the disk is full"):
        await server.run(endless(), failing())
    assert ended.is_set()
    assert server.stopping.is_set()
