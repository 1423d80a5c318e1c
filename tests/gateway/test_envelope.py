"""What a REST client sees: statuses, bodies and headers (contract 1.3, 1.4, 1.5, 1.9)."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from deploy.local.ports import free_port
from tests.gateway.conftest import SECRET, Gateway, Seen, running_gateway

ROLE = {"role_name": "Zoë", "permissions": ["role:all"]}


def check_headers(response: httpx.Response) -> None:
    """Every answer of the API carries these, errors too."""
    assert response.headers["x-api-version"] == "1.5.0"
    assert response.headers["access-control-allow-origin"] == "*"
    assert response.headers["access-control-allow-headers"] == "*"
    assert response.headers["access-control-allow-methods"] == "*"
    assert response.headers["access-control-allow-credentials"] == "true"
    assert response.headers.get_list("x-api-version") == ["1.5.0"]
    if response.status_code != 204:
        assert response.headers["content-type"] == "application/json"
    assert not [name for name in response.headers if name.startswith(("x-esd-", "grpc-", "x-envoy-"))]


def check_error(response: httpx.Response, status: int, message: str) -> None:
    """An error is exactly its status and a sentence."""
    assert (response.status_code, response.json()) == (status, {"statusCode": status, "message": message})
    check_headers(response)


async def test_an_empty_answer_has_no_data(gateway: Gateway) -> None:
    response = await gateway.client.get("/ping")
    assert (response.status_code, response.json()) == (200, {"statusCode": 200, "message": "pong"})
    check_headers(response)


async def test_an_answer_is_the_data(gateway: Gateway) -> None:
    body = (await gateway.client.get("/roles")).json()
    role = {"role_name": "x" * 1000, "creator": "", "permissions": []}
    keys = {"previous_evaluated_key": "not_applicable", "last_evaluated_key": None}
    assert body == {"statusCode": 200, "data": {"roles": [role], **keys}, "message": "OK"}


async def test_status_and_message_are_the_services_own_in_any_language(gateway: Gateway) -> None:
    response = await gateway.client.post("/roles", json=ROLE)
    assert response.json() == {"statusCode": 201, "message": 'role "Zoë" created\n100%'}
    assert response.status_code == 201
    check_headers(response)


async def test_204_has_no_body_and_no_length(gateway: Gateway) -> None:
    response = await gateway.client.request("DELETE", "/roles", json={"role_name_list": ["a"]})
    assert (response.status_code, response.content) == (204, b"")
    assert "content-length" not in response.headers
    assert "content-type" not in response.headers
    check_headers(response)


@pytest.mark.parametrize(
    ("method", "path", "body", "said"),
    [
        ("POST", "/roles", [], "the body must be a JSON object"),
        ("POST", "/roles", {"role_name": 5}, "role_name: invalid value 5; a text is wanted"),
        ("POST", "/roles", {"role_name": ["a"]}, "a list stands where a single value is wanted"),
        ("POST", "/inferences", {"payload_string": {}}, "payload_string: a single value is wanted, not an object"),
        ("POST", "/inferences", {"priority": "high"}, 'priority: invalid value "high"; a whole number is wanted'),
        ("POST", "/inferences", {"models": " for type x"}, 'models: invalid value " for type x"; an object is wanted'),
        ("PUT", "/checkpoints/1", {"name": {}}, "name: a single value is wanted, not an object"),
    ],
)
async def test_a_body_of_other_types_is_refused_in_words_of_json(
    gateway: Gateway, method: str, path: str, body: object, said: str
) -> None:
    check_error(await gateway.client.request(method, path, json=body), 400, said)


async def test_a_raw_answer_passes_as_it_is(gateway: Gateway, seen: Seen) -> None:
    tags = {"a b.safetensors": [{"ETag": '"x"', "PartNumber": 1}]}
    response = await gateway.client.put("/checkpoints/1-2", json={"status": "Active", "multi_parts_tags": tags})
    body = {"statusCode": 202, "message": "rename is processing, please wait"}
    assert (response.status_code, response.json()) == (202, body)
    check_headers(response)
    assert seen.requests[0].checkpoint_id == "1-2"
    assert seen.requests[0].body.multi_parts_tags["a b.safetensors"].values[0].struct_value["PartNumber"] == 1


async def test_an_empty_raw_answer_is_an_empty_object(gateway: Gateway) -> None:
    response = await gateway.client.request("DELETE", "/endpoints", json={"endpoint_name_list": ["a"]})
    assert (response.status_code, response.content) == (200, b"{}")


async def test_an_answer_named_data_is_unwrapped(gateway: Gateway) -> None:
    body = (await gateway.client.get("/inferences/a-b")).json()
    assert body["data"]["InferenceJobId"] == "a-b"
    assert body["data"]["params"] == {"data": {"x": None}}
    assert (body["statusCode"], body["message"]) == (200, "OK")


async def test_a_large_answer_arrives_whole(gateway: Gateway) -> None:
    response = await gateway.client.get("/roles", params={"role": "9000"})
    assert len(response.json()["data"]["roles"]) == 9000


async def test_the_error_of_a_service_is_its_sentence(gateway: Gateway) -> None:
    response = await gateway.client.get("/roles", params={"role": "missing"})
    check_error(response, 404, 'no role "missing" in Zürich')


async def test_a_route_that_is_not_built_yet_is_501(gateway: Gateway) -> None:
    response = await gateway.client.get("/users")
    assert response.status_code == response.json()["statusCode"] == 501
    check_headers(response)


@pytest.mark.parametrize(("method", "path"), [("GET", "/nothing"), ("PATCH", "/roles"), ("GET", "/"), ("GET", "/prod")])
async def test_an_unknown_route_or_method_is_404(gateway: Gateway, method: str, path: str) -> None:
    check_error(await gateway.client.request(method, path), 404, "Not Found")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"role_name": ', "the body is not valid JSON: Unexpected end of string. Expected a value.\n\n^"),
        (b"role_name=a", "the body is not valid JSON: Unexpected token.\nrole_name=a\n^"),
        (b'{"role_name": "C:\\u"}', 'the body is not valid JSON: Illegal hex string.\n\\u"}\n^'),
        (b"\x1f\x8b", "the body is not valid JSON: Encountered non UTF-8 code points.\n\x1f\x8b\n^"),
        (b'{"role_name": "a", "role_name": "b"}', "role_name stands twice in the body"),
    ],
)
async def test_bad_json_is_400_and_says_so(gateway: Gateway, content: bytes, said: str) -> None:
    check_error(await gateway.client.post("/roles", content=content), 400, said)


async def test_a_value_of_the_wrong_type_is_400(gateway: Gateway) -> None:
    response = await gateway.client.post("/roles", json={"role_name": 5})
    assert response.status_code == response.json()["statusCode"] == 400


@pytest.mark.parametrize("key", [{}, {"x-api-key": ""}, {"x-api-key": "wrong"}])
@pytest.mark.parametrize(("method", "path"), [("POST", "/roles"), ("GET", "/nothing"), ("GET", "/trainings")])
async def test_a_bad_key_is_403_before_anything_else(
    gateway: Gateway, method: str, path: str, key: dict[str, str]
) -> None:
    async with httpx.AsyncClient(base_url=str(gateway.client.base_url)) as stranger:
        response = await stranger.request(method, path, content=b"{", headers=key)
    check_error(response, 403, "Forbidden")


async def test_a_service_that_is_down_is_503(gateway: Gateway) -> None:
    check_error(await gateway.client.get("/trainings"), 503, "the service is not available, try again")


async def test_a_service_that_stops_before_it_has_answered_is_503(gateway: Gateway) -> None:
    answer = await gateway.client.get("/roles", params={"role": "cancelled"})
    check_error(answer, 503, "the service is not available, try again")


async def test_identity_down_is_503(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, f"127.0.0.1:{free_port()}") as lonely:
        check_error(await lonely.client.get("/ping"), 503, "the service is not available, try again")


async def test_a_preflight_needs_no_key(gateway: Gateway, seen: Seen) -> None:
    async with httpx.AsyncClient(base_url=str(gateway.client.base_url)) as browser:
        for path in ("/", "/roles", "/inferences/1/start", "/nothing", "/prod/roles"):
            response = await browser.options(
                path, headers={"origin": "http://a", "access-control-request-method": "PUT"}
            )
            assert (response.status_code, response.content) == (204, b"")
            assert response.headers["access-control-allow-origin"] == "*"
            assert response.headers["access-control-allow-methods"] == "OPTIONS,GET,PUT,POST,DELETE,PATCH,HEAD"
            allowed = response.headers["access-control-allow-headers"].split(",")
            assert {"*", "username", "x-api-key", "content-type", "authorization"} <= set(allowed)
    assert not seen.checks


@pytest.mark.parametrize("content_type", ["text/plain;charset=UTF-8", "application/x-www-form-urlencoded", None])
async def test_the_body_is_json_whatever_its_content_type(
    gateway: Gateway, seen: Seen, content_type: str | None
) -> None:
    headers = {"content-type": content_type} if content_type else {}
    response = await gateway.client.post("/roles", content=b'{"role_name":"a","unknown":1}', headers=headers)
    assert response.status_code == 201
    assert seen.requests[0].role_name == "a"


async def test_the_base_path_is_taken_off(gateway: Gateway) -> None:
    assert (await gateway.client.get("/prod/ping")).json()["message"] == "pong"
    assert (await gateway.client.get("/prod//ping?x=//")).json()["message"] == "pong"
    assert (await gateway.client.get("/product/ping")).status_code == 404


async def test_each_listener_tells_identity_its_profile(gateway: Gateway, seen: Seen) -> None:
    await gateway.client.get("/prod/ping", headers={"username": "api"})
    await gateway.webui.get("/ping")
    assert [check.attributes.context_extensions["profile"] for check in seen.checks] == ["document", "webui"]
    assert seen.checks[0].attributes.request.http.headers["username"] == "api"
    assert seen.check_secrets == [SECRET, SECRET]
    assert [call["x-esd-token"] for call in seen.calls] == ["token for document", "token for webui"]
    assert all("x-api-key" not in call for call in seen.calls)
    body = {"endpoint_name_list": ["a"]}
    response = await gateway.webui.request("DELETE", "/endpoints", json=body)
    assert (response.status_code, response.content) == (204, b"")


async def test_identity_is_told_only_what_it_judges_by(gateway: Gateway, seen: Seen) -> None:
    told = {"username": "api", "authorization": "Bearer 61"}
    await gateway.client.get("/ping", headers=told | {"cookie": "private=1", "x-more": "private"})
    assert set(seen.checks[0].attributes.request.http.headers) == {"x-api-key", *told}


async def test_a_client_cannot_bring_an_identity(gateway: Gateway, seen: Seen) -> None:
    forged = {"x-esd-token": "forged", "x-esd-secret": "forged", "x-esd-other": "forged"}
    await gateway.client.get("/ping", headers=forged)
    assert seen.calls[0]["x-esd-token"] == "token for document"
    assert seen.check_secrets == [SECRET]
    assert "forged" not in str(seen.calls) + str(seen.checks)


@pytest.mark.slow
async def test_a_payload_of_many_megabytes_passes_and_more_is_413(gateway: Gateway) -> None:
    job = {"task_type": "txt2img", "inference_type": "Async", "payload_string": "x" * (60 << 20)}
    response = await gateway.client.post("/inferences", json=job)
    assert response.json()["data"]["inference"]["id"] == str(60 << 20)
    job["payload_string"] = "x" * (66 << 20)
    check_error(await gateway.client.post("/inferences", json=job), 413, "the body is too large")
    role = {"role_name": "x" * (5 << 20)}
    check_error(await gateway.client.post("/prod/roles", json=role), 413, "the body is too large")


async def test_too_many_headers_and_too_large_ones_are_431(gateway: Gateway) -> None:
    many = {f"x-header-{number}": "1" for number in range(150)}
    for headers in (many, {"x-large": "a" * 100_000}):
        answer = await gateway.client.get("/ping", headers=headers)
        assert answer.status_code == answer.json()["statusCode"] == 431


async def test_a_quota_is_429_and_says_when_to_try_again(gateway: Gateway) -> None:
    refused = await gateway.client.post("/inferences", json={"task_type": "one too many"})
    check_error(refused, 429, "enough")
    assert refused.headers["retry-after"] == "7"


async def test_an_idempotency_key_reaches_the_service_and_its_conflict_is_409(gateway: Gateway, seen: Seen) -> None:
    headers = {"Idempotency-Key": "k 1"}
    refused = await gateway.client.post("/inferences", json={"task_type": "another"}, headers=headers)
    check_error(refused, 409, "the key came with another body")
    assert seen.calls[-1]["idempotency-key"] == "k 1"
