"""Downloads over connections that break off."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web

from gpu_worker.files.transfer import Transfer, Unreached
from gpu_worker.job import JobError

PATIENCE_SECONDS = 1.0
MEBIBYTE = 2**20
CONTENT = bytes(range(256)) * (4 * MEBIBYTE // 256)


@dataclass
class BreakingStore:
    """An object store that sends the first bytes, lets more time pass than anybody's patience, and hangs up.

    `breaks` is after how many bytes each of the requests to come breaks off; the last one holds for all further
    requests where `for_ever`.
    """

    breaks: list[int]
    for_ever: bool = False
    url: str = ""
    requests: int = field(default=0)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """GET."""
        self.requests += 1
        response = web.StreamResponse()
        response.content_length = len(CONTENT)
        await response.prepare(request)
        if not self.breaks:
            await response.write(CONTENT)
            return response
        num_bytes = self.breaks[0] if self.for_ever else self.breaks.pop(0)
        await asyncio.sleep(1.2 * PATIENCE_SECONDS)  # the transfer takes its time
        await response.write(CONTENT[:num_bytes])
        assert request.transport is not None
        request.transport.close()
        return response


Serve = Callable[[BreakingStore], Awaitable[BreakingStore]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    runners = []

    async def start(store: BreakingStore) -> BreakingStore:
        application = web.Application()
        application.router.add_get("/bucket/{name}", store.handle)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        store.url = f"http://127.0.0.1:{runner.addresses[0][1]}/bucket/model"
        runners.append(runner)
        return store

    yield start
    for runner in runners:
        await runner.cleanup()


@pytest.fixture
async def transfer() -> AsyncIterator[Transfer]:
    async with Transfer(PATIENCE_SECONDS) as client:
        yield client


@pytest.mark.slow
async def test_a_download_that_breaks_late_is_tried_again_and_comes_whole(
    serve: Serve, transfer: Transfer, tmp_path: Path
) -> None:
    store = await serve(BreakingStore([2 * MEBIBYTE, 3 * MEBIBYTE]))
    await transfer.download(store.url, tmp_path / "model", "x.ckpt", len(CONTENT))
    assert (tmp_path / "model").read_bytes() == CONTENT
    assert store.requests == 3


@pytest.mark.slow
async def test_a_download_that_always_breaks_at_the_same_place_is_given_up(
    serve: Serve, transfer: Transfer, tmp_path: Path
) -> None:
    store = await serve(BreakingStore([2 * MEBIBYTE], for_ever=True))
    with pytest.raises(JobError, match=r"x\.ckpt cannot be downloaded: the object store does not answer") as failure:
        await transfer.download(store.url, tmp_path / "model", "x.ckpt", len(CONTENT))
    assert not isinstance(failure.value, Unreached)  # another attempt would do no better
    assert store.requests == 2
