"""What the gateway and the services decide together: keys, both client profiles, what is closed to everybody."""

from __future__ import annotations

import grpc
import httpx
import pytest

from deploy.local.stack import Stack
from esd.identity.v1 import identity_pb2, identity_pb2_grpc
from esd.inference.v1 import inference_pb2_grpc
from tests.e2e.conftest import Api


def check_envelope(answer: httpx.Response, status: int) -> str:
    """The shape of every error; answers its message."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body["statusCode"] == status
    assert set(body) == {"statusCode", "message"}
    assert answer.headers["x-api-version"] == "1.5.0"
    assert answer.headers["access-control-allow-origin"] == "*"
    assert answer.headers["content-type"].startswith("application/json")
    message: str = body["message"]
    return message


def test_a_bad_key_is_forbidden_before_anything_else_is_looked_at(stack: Stack) -> None:
    for headers in ({}, {"x-api-key": "wrong"}, {"x-api-key": "wrong", "x-esd-token": "x"}):
        answer = httpx.post(stack.url + "/roles", content="not json", headers=headers)
        assert check_envelope(answer, 403) == "Forbidden"


def test_the_profiles_differ_as_the_contract_says(admin: Api, webui: Api) -> None:
    body = {
        "endpoint_name": "profile",
        "endpoint_type": "Async",
        "instance_type": "local",
        "initial_instance_count": 1,
        "autoscaling_enabled": False,
        "assign_to_roles": ["nobody"],
    }
    name = "esd-async-profile"
    created = webui.call("POST", "/endpoints", body)
    assert (created.status, created.body["statusCode"]) == (202, 202)
    assert created.message == f"Endpoint deployment started: {name}"
    assert created.data["endpoint_status"] == "Creating"
    deleted = webui.call("DELETE", "/endpoints", {"endpoint_name_list": [name]})
    assert (deleted.status, deleted.body) == (204, None)
    created = admin.call("POST", "/endpoints", body)
    assert (created.status, created.body["statusCode"]) == (200, 200)
    deleted = admin.call("DELETE", "/endpoints", {"endpoint_name_list": [name]})
    assert (deleted.status, deleted.body) == (200, {})


def test_a_missing_username_is_the_keys_owner_in_one_profile_and_nobody_in_the_other(admin: Api, webui: Api) -> None:
    anonymous = Api(webui.url, webui.key)
    assert admin.call("GET", "/roles").status == 200
    assert anonymous.call("GET", "/roles").status == 401
    assert anonymous.call("GET", "/roles").message == "Unauthorized"
    assert anonymous.call("GET", "/ping").status == 200
    assert anonymous.call("GET", "/inferences").status == 200
    assert anonymous.call("POST", "/roles", {}).status == 400, "a bad body comes before a missing user"
    assert admin.call("GET", "/roles", headers={"username": "nobody-known"}).status == 401
    anonymous.close()


def test_the_first_administrator_of_a_webui_client(admin: Api, webui: Api) -> None:
    body = {"initial": True, "username": "boss", "password": "clear text", "roles": ["IT Operator"], "creator": "boss"}
    assert admin.call("POST", "/users", body, headers={"username": "boss"}).status in {401, 403}
    anonymous = Api(webui.url, webui.key, "boss")
    answer = anonymous.call("POST", "/users", body)
    assert answer.status == 201
    assert answer.data == {"user": {"username": "boss", "roles": ["IT Operator"]}, "all_roles": ["IT Operator", "byoc"]}
    (user,) = anonymous.ok("GET", "/users?username=boss&show_password=True")["users"]
    assert user["password"] == "clear text"
    (user,) = admin.ok("GET", "/users?username=boss&show_password=True")["users"]
    assert user["password"] == "********"
    anonymous.close()


async def test_what_is_inside_stays_closed_to_users_and_to_nobody(stack: Stack, admin: Api) -> None:
    async with grpc.aio.insecure_channel(stack.url.removeprefix("http://")) as channel:
        key = (("x-api-key", admin.key),)
        identity = identity_pb2_grpc.IdentityServiceStub(channel)
        queue = inference_pb2_grpc.QueueServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await identity.GetUser(identity_pb2.GetUserRequest(username="api"), metadata=key)
        assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await identity.IssueToken(identity_pb2.IssueTokenRequest(secret="guess"))
        assert unknown.value.code() == grpc.StatusCode.UNAUTHENTICATED
        for metadata in ((), key, (("x-esd-token", "forged"),)):
            stream = queue.Work(metadata=metadata)
            # The stream may be refused before a word is said on it, so only its end is looked at.
            assert await stream.code() in {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}


def test_the_store_behind_the_gateway_wants_its_own_signature(stack: Stack, admin: Api) -> None:
    answer = httpx.get(f"{stack.url}/esd/nothing", headers={"x-api-key": admin.key})
    assert answer.status_code in {400, 403, 412}, "no signature, no object"


def test_a_base_path_is_stripped(stack: Stack, admin: Api) -> None:
    headers = {"x-api-key": admin.key}
    assert httpx.get(stack.url + "/prod/ping", headers=headers).json()["message"] == "pong"
    roles = httpx.get(stack.url + "/prod/roles?role=byoc", headers=headers).json()["data"]["roles"]
    assert [role["role_name"] for role in roles] == ["byoc"]
    assert httpx.options(stack.url + "/prod/roles").status_code == 204
    check_envelope(httpx.get(stack.url + "/prod/roles"), 403)
