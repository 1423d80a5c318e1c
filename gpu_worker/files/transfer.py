"""Moves bytes over presigned URLs: one HTTP client with kept-alive connections, and patience with a busy store.

JobError
├── DiskFailed   there is no room here; another machine may do
├── Unreached    the store was away for longer than our patience; nothing is wrong with the job
└── UrlExpired   the store takes the URL no more; a new one may do
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import httpx
import structlog

from gpu_worker.files.reach import FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS, Reach, is_busy
from gpu_worker.job import JobError

log = structlog.get_logger()
T = TypeVar("T")

PATIENCE_SECONDS = 60.0
# Of a worker with results: to make them again costs more than to keep them, but whoever waits for them waits on.
RESULT_PATIENCE_SECONDS = 900.0
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_CHUNK_BYTES = 1 << 20
_EXPIRED = b"expired"  # "Request has expired", ExpiredToken: in the body of S3's refusal


class DiskFailed(JobError):
    """What is downloaded has no room here, or the disk cannot be used."""


class Unreached(JobError):
    """The store does not answer, or only that it cannot serve anybody now."""


class UrlExpired(JobError):
    """The URL is over, or the credentials that signed it are."""


class _Refused(JobError):
    """The store's answer is final."""


class _Expired(_Refused):
    """And about the URL, not about the object."""


class _Patience:
    """When to give up. Attempts begin at the first byte again, so that only what exceeds them all counts as progress:
    an object whose transfer breaks at the same place each time is given up.
    """

    def __init__(self, seconds: float, since: float | None = None) -> None:
        self._seconds = seconds
        self._give_up_at = (time.monotonic() if since is None else since) + seconds
        self._bytes = self._most_bytes = self._most_before = 0

    @property
    def seconds_left(self) -> float:
        """How long it lasts from now on."""
        return max(0.0, self._give_up_at - time.monotonic())

    @property
    def is_of_object(self) -> bool:
        """Whether the present attempt broke off where an earlier one did, or before: the store is there."""
        return 0 < self._bytes <= self._most_before

    def begin(self) -> None:
        """An attempt begins at the first byte."""
        self._bytes, self._most_before = 0, self._most_bytes

    def received(self, num_bytes: int) -> None:
        """So many bytes of the object came in the present attempt."""
        self._bytes = num_bytes
        if num_bytes > self._most_bytes:
            self._most_bytes = num_bytes
            self._give_up_at = time.monotonic() + self._seconds

    def ends_within(self, seconds: float) -> bool:
        """Whether it is over by then."""
        return seconds > self.seconds_left


class Transfer:
    """Downloads and uploads. A failure of the connection, a 5xx or a 403 is tried again, until `patience_seconds` have
    passed since the last progress: the first attempt, or bytes of the object that no attempt before had received. What
    is downloaded while `reach` knows that the store is away has only what is left of that time. Uploads may have more.
    """

    def __init__(
        self, patience_seconds: float = PATIENCE_SECONDS, upload_patience_seconds: float | None = None
    ) -> None:
        self._client = httpx.AsyncClient(timeout=httpx.Timeout(60, connect=10), follow_redirects=False)
        self._patience_seconds = patience_seconds
        self._upload_seconds = patience_seconds if upload_patience_seconds is None else upload_patience_seconds
        self.reach = Reach(self._client)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.reach.close()
        await self._client.aclose()

    async def download(self, url: str, path: Path, name: str, size_bytes: int = 0, sha256: str = "") -> str:
        """Writes the object to the file and answers its SHA-256 in hex. `name` is for messages.

        Raises:
            JobError: the store does not have it, or size or SHA-256 differ (0 and "": not known).
            DiskFailed, Unreached, UrlExpired.
        """
        patience = _Patience(self._patience_seconds, self.reach.away_since)
        found_bytes, found_sha256 = await self._patiently(
            f"{name} cannot be downloaded", url, patience, lambda: self._get(url, path, patience)
        )
        if size_bytes and found_bytes != size_bytes:
            raise JobError(f"{name} has {found_bytes} bytes in the store, not the {size_bytes} that were recorded")
        if sha256 and found_sha256 != sha256.lower():
            raise JobError(f"the SHA-256 of {name} in the store is {found_sha256}, not {sha256.lower()} as recorded")
        return found_sha256

    async def read(self, url: str, name: str, sha256: str = "") -> bytes:
        """The object's content. Raises JobError as download() does."""
        patience = _Patience(self._patience_seconds, self.reach.away_since)
        response = await self._patiently(f"{name} cannot be downloaded", url, patience, lambda: self._send("GET", url))
        if sha256 and hashlib.sha256(response.content).hexdigest() != sha256.lower():
            raise JobError(f"the SHA-256 of {name} in the store is not the one that was recorded")
        return response.content

    async def upload(self, url: str, content: bytes, name: str) -> None:
        """Writes the object.

        Raises:
            JobError: the store refuses it. Unreached, UrlExpired.
        """
        patience = _Patience(self._upload_seconds)
        await self._patiently(f"{name} cannot be uploaded", url, patience, lambda: self._send("PUT", url, content))

    async def _send(self, method: str, url: str, content: bytes | None = None) -> httpx.Response:
        response = await self._client.request(method, url, content=content)
        await _check(response)
        return response

    async def _get(self, url: str, path: Path, patience: _Patience) -> tuple[int, str]:
        patience.begin()
        digest = hashlib.sha256()
        num_bytes = 0
        with path.open("wb") as file:

            def take(chunk: bytes) -> None:
                file.write(chunk)
                digest.update(chunk)

            async with self._client.stream("GET", url) as response:
                await _check(response)
                async for chunk in response.aiter_raw(_CHUNK_BYTES):
                    num_bytes += len(chunk)
                    patience.received(num_bytes)
                    await asyncio.to_thread(take, chunk)
        return num_bytes, digest.hexdigest()

    async def _patiently(self, problem: str, url: str, patience: _Patience, attempt: Callable[[], Awaitable[T]]) -> T:
        if not patience.seconds_left:  # an attempt might hang, and others wait for their turn at the same model
            raise Unreached(f"{problem}: the object store has not answered for a while")
        began, delay = time.monotonic(), FIRST_DELAY_SECONDS
        while True:
            try:
                return await attempt()
            except _Expired as error:
                raise UrlExpired(f"{problem}: {error}") from None
            except _Refused as error:
                raise JobError(f"{problem}: {error}") from None
            except httpx.HTTPStatusError as error:
                reason = f"the object store answers {error.response.status_code}"
            except httpx.TransportError as error:
                reason = f"the object store does not answer ({type(error).__name__})"
            except OSError as error:
                if error.errno in DISK_FULL:
                    raise DiskFailed(f"{problem}: the worker's disk is full") from error
                raise
            self.reach.doubt(url)
            if patience.ends_within(delay):
                # A store that is there, but full or with a damaged object, is the same for every attempt.
                is_outage = not patience.is_of_object and await self.reach.was_away_after(began, url)
                raise (Unreached if is_outage else JobError)(f"{problem}: {reason}")
            if delay == FIRST_DELAY_SECONDS:
                log.warning("a transfer is tried again, until our patience ends", problem=problem, reason=reason)
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            await self.reach.wait(patience.seconds_left)
            delay = min(2 * delay, MAX_DELAY_SECONDS)


async def _check(response: httpx.Response) -> None:
    if is_busy(response):
        raise httpx.HTTPStatusError("busy", request=response.request, response=response)
    if response.is_success:
        return
    answer = f"the object store answers {response.status_code}"
    if response.status_code == httpx.codes.NOT_FOUND:
        raise _Refused(f"{answer}, it has no such object")
    if _EXPIRED in (await response.aread()).lower():
        raise _Expired(f"{answer}, the URL has expired")
    if response.status_code == httpx.codes.FORBIDDEN:
        # The URL is signed by who may: a store whose own directory of users is away, say. Results are worth a wait.
        raise httpx.HTTPStatusError(answer, request=response.request, response=response)
    raise _Refused(answer)
