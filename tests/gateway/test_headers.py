"""No header of one caller spoils a connection between the gateway and a service, which all callers share."""

from __future__ import annotations

import httpx
import pytest

from tests.gateway.conftest import Gateway, Seen

# gRPC servers remember what they could not read for the life of the connection, and refuse all that follows on it.
UNREADABLE = [
    ("grpc-timeout", b"junk"),
    ("grpc-timeout", b"1n"),
    ("grpc-timeout", b"123456789S"),
    ("grpc-encoding", b"junk"),
    ("grpc-status", b"5"),
    ("grpc-retry-pushback-ms", b"x"),
    ("x-junk-bin", b"###"),
    ("x_esd_token", b"forged"),  # which some servers read as x-esd-token
    ("trace_id", b"1"),
    ("x^y", b"1"),
    ("it's", b"1"),
    ("x-a", b"\xff"),
    ("x-a", b""),
    ("username", b"\xff"),
    ("authorization", b"\xff"),
    ("username", b""),
    ("user-agent", b"\xe9"),
    ("x-envoy-upstream-rq-timeout-ms", b"1"),
    ("x-envoy-other", b"1"),
    ("te", b"junk"),
]


@pytest.mark.parametrize(("name", "value"), UNREADABLE)
async def test_an_unreadable_header_of_rest_goes_no_further(
    gateway: Gateway, seen: Seen, name: str, value: bytes
) -> None:
    for _ in range(3):
        response = await gateway.client.get("/ping", headers=[(name.encode(), value)])
        assert (response.status_code, response.json()["message"]) == (200, "pong")
    assert len(seen.calls) == 3
    if value and name not in ("username", "authorization"):  # which identity reads, and takes off
        assert not any(name in call for call in seen.calls)


@pytest.mark.parametrize(("name", "value"), UNREADABLE)
async def test_an_unreadable_header_of_a_caller_without_a_key_spoils_nothing(
    gateway: Gateway, name: str, value: bytes
) -> None:
    path = "/esd.identity.v1.IdentityService/IssueToken"  # where no key is asked for
    headers = [(name.encode(), value), (b"content-type", b"application/grpc"), (b"te", b"trailers")]
    async with httpx.AsyncClient(base_url=f"http://{gateway.address}") as anonymous:
        for _ in range(2):
            await anonymous.post(path, content=bytes(5), headers=headers)
    response = await gateway.client.get("/ping")
    assert (response.status_code, response.json()["message"]) == (200, "pong")


async def test_json_of_a_type_that_only_looks_like_grpc_has_its_envelope(gateway: Gateway) -> None:
    response = await gateway.client.get("/ping", headers={"content-type": "application/grpc-web"})
    assert response.json() == {"statusCode": 200, "message": "pong"}
