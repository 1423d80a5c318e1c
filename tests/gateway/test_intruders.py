"""No spelling of a request opens what needs a key: raw HTTP/1.1 and HTTP/2, as no honest client would send it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable

import grpc
import h2.config
import h2.connection
import h2.events
import h2.exceptions
import httpx
import pytest

from esd.identity.v1 import identity_pb2, identity_pb2_grpc
from tests.gateway.conftest import KEY, Gateway, Seen, Store

WITHOUT_KEY = (
    "/roles", "//roles", "/prod//roles", "/prod/prod/roles", "/%2froles", "/%2e%2e/roles", "/./roles", "roles", "*",
    "//esd-bucket/../roles", "/prod/esd-bucket/a", "/esd-bucket%2f..%2froles", "/esd-bucket;a/roles", "/ESD-BUCKET/a",
    "/esd-bucket\\..\\roles", "http://other/roles", "/roles?x=/esd-bucket/a", "/roles#/esd-bucket/", "/api", "//api",
    "/prod/api", "/api/", "/esd.identity.v1.IdentityService/ListRoles", "/esd.identity.v1.IdentityService//IssueToken",
    "/esd.identity.v1.IdentityService/IssueToken/../ListRoles", "/esd.identity.v1.IdentityService/issueToken",
)  # fmt: skip
OF_THE_BUCKET = ("/esd-bucket/../roles", "/esd-bucket/%2e%2e/roles", "/esd-bucket/..%2froles", "/esd-bucket//roles")
METHODS = ("TRACE", "HEAD", "PATCH", "PROPFIND", "CONNECT", "get", "PRI", "GET" * 2000)
GET = {":method": "GET", ":scheme": "http", ":authority": "gateway", ":path": "/roles"}
FRAMES = {
    "a second path": [*GET.items(), (":path", "/esd-bucket/a")],
    "a path without a slash": (GET | {":path": "roles"}).items(),
    "an empty path": (GET | {":path": ""}).items(),
    "a line end in the path": (GET | {":path": "/esd-bucket/a HTTP/1.1\r\nx: y"}).items(),
    "a line end in a value": [*GET.items(), ("a", "b\r\nx-esd-token: forged")],
    "a pseudo-header at the end": [("a", "b"), *GET.items()],
    "an unknown pseudo-header": [*GET.items(), (":protocol", "websocket")],
    "a status": [*GET.items(), (":status", "200")],
    "an odd scheme": (GET | {":scheme": "esd-bucket"}).items(),
    "an odd method": (GET | {":method": "GET /esd-bucket/a HTTP/1.1"}).items(),
    "a tunnel": [(":method", "CONNECT"), (":authority", "127.0.0.1:22")],
    "a header in capitals": [*GET.items(), ("X-Esd-Token", "forged")],
    "a header of the connection": [*GET.items(), ("transfer-encoding", "chunked")],
}


async def http1(gateway: Gateway, head: str) -> int:
    """The status of the answer to these lines, 0 where there is none."""
    reader, writer = await asyncio.open_connection(*gateway.address.split(":"))
    writer.write(head.encode("latin-1"))
    try:
        async with asyncio.timeout(20):
            answer = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", answer)
            await reader.readexactly(int(length[1]) if length and not head.startswith("HEAD") else 0)
    except asyncio.IncompleteReadError:
        return 0
    finally:
        writer.close()
    return int(answer.split(b" ")[1])


async def http2(gateway: Gateway, headers: Iterable[tuple[str, str]]) -> int:
    """The status of the answer to these headers, sent as they are; 0 where there is none."""
    config = h2.config.H2Configuration(validate_outbound_headers=False, normalize_outbound_headers=False)
    state = h2.connection.H2Connection(config)
    state.initiate_connection()
    state.send_headers(1, list(headers), end_stream=True)
    reader, writer = await asyncio.open_connection(*gateway.address.split(":"))
    writer.write(state.data_to_send())
    status = 0
    try:
        while not status and (received := await asyncio.wait_for(reader.read(65536), 20)):
            for event in state.receive_data(received):
                if isinstance(event, h2.events.ResponseReceived):
                    status = int(dict(event.headers)[b":status"])
                if isinstance(event, h2.events.StreamReset | h2.events.ConnectionTerminated):
                    return 0
    except ConnectionResetError:
        return 0
    finally:
        writer.close()
    return status


async def is_unharmed(gateway: Gateway) -> bool:
    """Whether others are served as before."""
    return (await gateway.client.get("/ping")).json() == {"statusCode": 200, "message": "pong"}


@pytest.mark.parametrize("path", WITHOUT_KEY, ids=[path.replace("/", "|") for path in WITHOUT_KEY])
async def test_no_spelling_of_a_path_opens_it_without_a_key(
    gateway: Gateway, store: Store, seen: Seen, path: str
) -> None:
    store.requests.clear()
    assert await http1(gateway, f"GET {path} HTTP/1.1\r\nHost: gateway\r\n\r\n") in {400, 403}
    assert not seen.calls
    assert not store.requests


@pytest.mark.parametrize("path", OF_THE_BUCKET)
async def test_what_begins_as_the_bucket_goes_to_the_store_as_it_is_and_nowhere_else(
    gateway: Gateway, store: Store, seen: Seen, path: str
) -> None:
    store.requests.clear()
    assert await http1(gateway, f"GET {path} HTTP/1.1\r\nHost: gateway\r\nx-api-key: {KEY}\r\n\r\n") == 200
    ((_, reached, headers, _),) = store.requests
    assert reached == path
    assert "x-api-key" not in headers
    assert not seen.checks


@pytest.mark.parametrize("method", METHODS, ids=[method[:8] for method in METHODS])
async def test_no_other_method_is_let_in(gateway: Gateway, seen: Seen, method: str) -> None:
    for header, statuses in (("", {400, 403}), (f"x-api-key: {KEY}\r\n", {400, 404})):
        assert await http1(gateway, f"{method} /roles HTTP/1.1\r\nHost: gateway\r\n{header}\r\n") in statuses
    assert not seen.calls
    assert await is_unharmed(gateway)


@pytest.mark.parametrize(
    "lines",
    [
        "connection: x-api-key",
        "transfer-encoding: chunked\r\ncontent-length: 5",
        "content-length: -1",
        "content-length: 5\r\ncontent-length: 6",
        "x-api-key: another",
        "connection: upgrade\r\nupgrade: websocket",
    ],
)
async def test_headers_that_two_readers_could_read_differently_are_refused(
    gateway: Gateway, seen: Seen, lines: str
) -> None:
    head = f"GET /roles HTTP/1.1\r\nHost: gateway\r\nx-api-key: {KEY}\r\n{lines}\r\n\r\n"
    assert await http1(gateway, head) in {400, 403}
    assert not seen.calls


@pytest.mark.parametrize("headers", FRAMES.values(), ids=FRAMES)
async def test_no_frame_of_odd_headers_opens_anything(
    gateway: Gateway, store: Store, seen: Seen, headers: Iterable[tuple[str, str]]
) -> None:
    store.requests.clear()
    assert await http2(gateway, headers) in {0, 400, 403, 404}
    assert not seen.calls
    assert not store.requests
    assert await is_unharmed(gateway)
    assert await http2(gateway, [*GET.items(), ("x-api-key", KEY)]) == 200


@pytest.mark.parametrize(
    "method", ["/grpc.health.v1.Health/Check", "/esd.worker.v1.GpuWorkerService/Generate", "/esd.identity.v1.X/Y", "/x"]
)
async def test_a_key_opens_no_rpc_that_is_not_the_apis(gateway: Gateway, method: str) -> None:
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        call = channel.unary_unary(method, request_serializer=bytes, response_deserializer=bytes)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(b"", metadata=(("x-api-key", KEY),))
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_nobody_sends_much_where_no_key_is_asked_for(gateway: Gateway) -> None:
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        stub = identity_pb2_grpc.IdentityServiceStub(channel)
        assert (await stub.IssueToken(identity_pb2.IssueTokenRequest(secret="s" * 10_000))).token
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.IssueToken(identity_pb2.IssueTokenRequest(secret="s" * 20_000))


async def test_what_envoy_cannot_do_has_a_sentence_too(gateway: Gateway) -> None:
    """An answer beyond the gateway's own limit, which no service gives."""
    async with httpx.AsyncClient(base_url=f"http://{gateway.address}", timeout=120) as client:
        answer = await client.get("/roles", params={"role": "110000"}, headers={"x-api-key": KEY})
    assert (answer.status_code, answer.json()) == (500, {"statusCode": 500, "message": "Internal Server Error"})
