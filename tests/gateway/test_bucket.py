"""The bucket passes untouched: a presigned URL is signed for every byte of path and Host."""

from __future__ import annotations

import asyncio
import http.client
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.local.ports import free_port
from tests.conftest import S3Access
from tests.gateway.conftest import Gateway, Seen, Store, running_gateway

ODD_PATHS = [
    "/esd-bucket",
    "/esd-bucket/",
    "/esd-bucket?list-type=2&prefix=a%2Fb",
    "/esd-bucket/plain.safetensors?X-Amz-Signature=a%2Bb&X-Amz-Credential=x%2F1",
    "/esd-bucket/with%20space%20%5B1%5D%28v2%29.ckpt",
    "/esd-bucket/raw[brackets](and)parens,+plus~tilde!.png",
    "/esd-bucket/encoded%2Fslash%252Ftwice%7E%2e",
    "/esd-bucket//double//slashes/",
    "/esd-bucket/a/../b/./c",
    "/esd-bucket/caf%C3%A9%E2%9C%93.png",
]


def exchange(
    address: str, method: str, path: str, body: Iterator[bytes] | None = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """One request whose path is sent as it is written, without the tidying of ordinary clients."""
    connection = http.client.HTTPConnection(address, timeout=60)
    try:
        connection.request(method, path, body=body, headers=headers or {})
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
    finally:
        connection.close()


@pytest.mark.parametrize("path", ODD_PATHS)
async def test_path_query_and_host_reach_the_store_as_sent(
    gateway: Gateway, store: Store, seen: Seen, path: str
) -> None:
    store.requests.clear()
    host = {"Host": "pictures.example:8080"}
    status, headers, body = await asyncio.to_thread(exchange, gateway.address, "GET", path, headers=host)
    assert (status, headers["etag"], body) == (200, '"of the store"', b"stored")
    assert (headers["x-content-type-options"], headers["content-security-policy"]) == ("nosniff", "sandbox")
    method, received, received_headers, _ = store.requests[0]
    assert (method, received, received_headers["host"]) == ("GET", path, "pictures.example:8080")
    assert not seen.checks


async def test_the_store_answers_its_own_preflights(gateway: Gateway, store: Store) -> None:
    store.requests.clear()
    status, headers, _ = await asyncio.to_thread(exchange, gateway.address, "OPTIONS", "/esd-bucket/key")
    assert (status, headers["etag"]) == (200, '"of the store"')
    assert "access-control-allow-origin" not in headers
    assert "x-api-version" not in headers
    assert store.requests[0][0] == "OPTIONS"


async def test_a_large_object_streams_through(gateway: Gateway, store: Store) -> None:
    store.requests.clear()
    megabytes = 200
    length = {"Content-Length": str(megabytes << 20)}
    chunks = (bytes(1 << 20) for _ in range(megabytes))
    status, _, _ = await asyncio.to_thread(exchange, gateway.address, "PUT", "/esd-bucket/big", chunks, length)
    assert (status, store.requests[0][3]) == (200, megabytes << 20)


async def test_the_webui_listener_passes_the_bucket_too(gateway: Gateway) -> None:
    status, _, _ = await asyncio.to_thread(exchange, gateway.webui_address, "GET", "/esd-bucket/key")
    assert status == 200


@pytest.mark.parametrize("path", ["/esd-buckets/key", "/esd-bucketx", "/ESD-BUCKET/key", "/x/../esd-bucket/key"])
async def test_a_path_that_only_resembles_the_bucket_needs_a_key(gateway: Gateway, store: Store, path: str) -> None:
    store.requests.clear()
    status, _, _ = await asyncio.to_thread(exchange, gateway.address, "GET", path)
    assert status == 403
    assert not store.requests


async def test_a_store_that_is_down_is_503(
    services: tuple[str, Seen], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("storeless")
    bucket = {"ESD_S3_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}", "ESD_S3_BUCKET": "esd-bucket"}
    async with running_gateway(folder, services[0], **bucket) as lonely:
        status, _, _ = await asyncio.to_thread(exchange, lonely.address, "GET", "/esd-bucket/key")
    assert status == 503


@pytest.mark.parametrize("key", ["a b/[x](1)+é~%2F%.png", "Lora/checkpoint/custom/1/plain.safetensors", "a//b"])
async def test_presigned_urls_of_the_real_store_work_through_the_gateway(
    services: tuple[str, Seen], s3: S3Access, tmp_path: Path, key: str
) -> None:
    bucket = {"ESD_S3_ENDPOINT_URL": s3.endpoint_url, "ESD_S3_BUCKET": s3.bucket}
    async with running_gateway(tmp_path, services[0], **bucket) as gateway, httpx.AsyncClient(timeout=30) as client:
        signer: Any = s3.client(f"http://{gateway.address}")
        target = {"Bucket": s3.bucket, "Key": key}
        put = await client.put(signer.generate_presigned_url("put_object", Params=target), content=b"weights")
        assert put.status_code == 200
        got = await client.get(signer.generate_presigned_url("get_object", Params=target))
        assert (got.status_code, got.content, got.headers["etag"]) == (200, b"weights", put.headers["etag"])
        forged = await client.get(signer.generate_presigned_url("get_object", Params=target) + "0")
        assert forged.status_code == 403
        asked = {"origin": "http://page.example", "access-control-request-method": "PUT"}
        preflight = await client.options(signer.generate_presigned_url("put_object", Params=target), headers=asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] in ("*", asked["origin"])
