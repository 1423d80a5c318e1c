"""Whether the object store is there at all. A transfer that failed makes us look, and we look on until it answers.

Meanwhile the worker takes no jobs: each would need the store, and wait here where no other worker can have it.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import urlsplit

import httpx
import structlog

log = structlog.get_logger()

FIRST_DELAY_SECONDS = 0.2
MAX_DELAY_SECONDS = 8.0
_LOOK_SECONDS = 10.0
_BUSY = (httpx.codes.REQUEST_TIMEOUT, httpx.codes.TOO_MANY_REQUESTS)


class Reach:
    """The store as this process sees it. `on_change` is called when it goes and when it is back."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self.away_since: float | None = None  # by the monotonic clock
        self._back_at = -math.inf
        self._client = client
        self._there = asyncio.Event()
        self._there.set()
        self._looking: asyncio.Task[None] | None = None

    @property
    def is_away(self) -> bool:
        """Whether nothing has answered since we last looked."""
        return self.away_since is not None

    async def was_away_after(self, moment: float, url: str) -> bool:
        """Whether the store of the URL is away, or was at some time after that moment of the monotonic clock."""
        return self.is_away or self._back_at > moment or not await self._answers(_bucket(url))

    def doubt(self, url: str) -> None:
        """A transfer from or to the URL has failed."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look(_bucket(url)))

    async def wait(self, seconds: float | None = None) -> None:
        """Returns when the store is there, or after so many seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._there.wait()

    async def close(self) -> None:
        """Looks no more."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)

    async def _look(self, bucket: str) -> None:
        began, delay = time.monotonic(), FIRST_DELAY_SECONDS
        while not await self._answers(bucket):
            if self.away_since is None:
                log.warning("the object store is not reached; no jobs are taken until it is")
                self.away_since = began
                self._there.clear()
                self.on_change()
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            delay = min(2 * delay, MAX_DELAY_SECONDS)
        if self.away_since is not None:
            log.info("the object store is reached again", seconds=round(time.monotonic() - began, 1))
            self.away_since, self._back_at = None, time.monotonic()
            self._there.set()
            self.on_change()

    async def _answers(self, bucket: str) -> bool:
        """Whether there is an answer, which will be a refusal: the question is not signed."""
        try:
            async with self._client.stream("GET", bucket, timeout=_LOOK_SECONDS) as response:
                return not is_busy(response)
        except httpx.TransportError:
            return False


def is_busy(response: httpx.Response) -> bool:
    """Whether the same request may be answered otherwise later. 408 is of a line that was silent for too long."""
    return response.status_code >= 500 or response.status_code in _BUSY


def _bucket(url: str) -> str:
    """The URL of the bucket in the path style; nothing else there may lead to the store. With its slash: the bucket may
    be the host's name, and what is asked for a folder of it."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}/{parts.path.lstrip('/').partition('/')[0]}/"
