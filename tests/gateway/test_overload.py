"""The gateway's memory: bodies that never end fill it up to a limit, at which requests are refused and nothing dies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import pytest

from tests.gateway.conftest import KEY, Seen, running_gateway

pytestmark = pytest.mark.slow

MIB = 1 << 20
REFUSED = {"statusCode": 503, "message": "the service is not available, try again"}


class Upload:
    """A payload of 48 MiB of which 16 are sent, and the rest when somebody says so."""

    def __init__(self, client: httpx.AsyncClient, url: str) -> None:
        self.stalls, self._may_go_on = asyncio.Event(), asyncio.Event()
        headers = {"x-api-key": KEY, "content-type": "application/json"}
        self._answer = asyncio.create_task(client.post(url, content=self._body(), headers=headers))
        self._answer.add_done_callback(lambda _: self.stalls.set())

    async def _body(self) -> AsyncIterator[bytes]:
        yield b'{"task_type":"txt2img","inference_type":"Async","payload_string":"'
        for _ in range(16):
            yield b"x" * MIB
        self.stalls.set()
        await self._may_go_on.wait()
        for _ in range(32):
            yield b"x" * MIB
        yield b'"}'

    @property
    def is_over(self) -> bool:
        """Whether it was answered or cut."""
        return self._answer.done()

    async def end(self) -> int:
        """The status of the answer, 0 for a connection that was cut."""
        self._may_go_on.set()
        try:
            return (await self._answer).status_code
        except httpx.TransportError:
            return 0


async def ping(client: httpx.AsyncClient) -> httpx.Response | None:
    """The answer; none where the connection was cut."""
    try:
        return await client.get("/ping")
    except httpx.TransportError:
        return None


@pytest.mark.parametrize("http2", [False, True])
async def test_bodies_that_stall_are_answered_with_503_before_the_memory_is_full(
    services: tuple[str, Seen], tmp_path: Path, http2: bool
) -> None:
    async with AsyncExitStack() as stack:
        settings = {"ESD_MAX_HEAP_BYTES": str(128 * MIB)}
        gateway = await stack.enter_async_context(running_gateway(tmp_path, services[0], **settings))
        client = await stack.enter_async_context(httpx.AsyncClient(http1=not http2, http2=http2, timeout=60))
        uploads: list[Upload] = []
        while (answer := await ping(gateway.client)) is None or answer.status_code == 200:
            if any(upload.is_over for upload in uploads):
                break  # one that went on was cut, and there is room again
            assert len(uploads) < 20, "as many as that do not fit"
            uploads.append(Upload(client, f"http://{gateway.address}/inferences"))
            await uploads[-1].stalls.wait()
        else:
            assert (answer.status_code, answer.json()) == (503, REFUSED)

        ends = await asyncio.gather(*(upload.end() for upload in uploads))
        assert set(ends) <= {201, 503, 0}
        assert set(ends) != {201}, "more than the limit was taken"
        while (answer := await ping(gateway.client)) is None or answer.status_code == 503:  # noqa: ASYNC110 - of Envoy
            await asyncio.sleep(0.05)
        assert answer.json() == {"statusCode": 200, "message": "pong"}
