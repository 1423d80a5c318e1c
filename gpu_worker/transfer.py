"""Moves bytes over presigned URLs: one HTTP client with kept-alive connections, and patience with a busy store."""

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

from gpu_worker.job import JobError

log = structlog.get_logger()
T = TypeVar("T")

PATIENCE_SECONDS = 60.0
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_CHUNK_BYTES = 1 << 20
_FIRST_DELAY_SECONDS = 0.2
_MAX_DELAY_SECONDS = 8.0


class DiskFull(JobError):
    """What is downloaded has no room here."""


class _Refused(JobError):
    """The store's answer is final."""


class _Patience:
    """When to give up. Attempts begin at the first byte again, so that only what exceeds them all counts as progress:
    an object whose transfer breaks at the same place each time is given up.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._give_up_at = time.monotonic() + seconds
        self._most_bytes = 0

    def received(self, num_bytes: int) -> None:
        """So many bytes of the object came in the present attempt."""
        if num_bytes > self._most_bytes:
            self._most_bytes = num_bytes
            self._give_up_at = time.monotonic() + self._seconds

    def ends_within(self, seconds: float) -> bool:
        """Whether it is over by then."""
        return time.monotonic() + seconds > self._give_up_at


class Transfer:
    """Downloads and uploads. A failure of the connection or a 5xx is tried again, until `patience_seconds` have passed
    since the last progress: the first attempt, or bytes of the object that no attempt before had received.
    """

    def __init__(self, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self._client = httpx.AsyncClient(timeout=httpx.Timeout(60, connect=10), follow_redirects=False)
        self._patience_seconds = patience_seconds

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def download(self, url: str, path: Path, name: str, size_bytes: int = 0, sha256: str = "") -> str:
        """Writes the object to the file and answers its SHA-256 in hex. `name` is for messages.

        Raises:
            JobError: the store does not have it or does not answer, or size or SHA-256 differ (0 and "": not known).
            DiskFull: it has no room here.
        """
        found_bytes, found_sha256 = await self._patiently(
            f"{name} cannot be downloaded", lambda patience: self._get(url, path, patience)
        )
        if size_bytes and found_bytes != size_bytes:
            raise JobError(f"{name} has {found_bytes} bytes in the store, not the {size_bytes} that were recorded")
        if sha256 and found_sha256 != sha256.lower():
            raise JobError(f"the SHA-256 of {name} in the store is {found_sha256}, not {sha256.lower()} as recorded")
        return found_sha256

    async def read(self, url: str, name: str, sha256: str = "") -> bytes:
        """The object's content. Raises JobError as download() does."""
        response = await self._patiently(f"{name} cannot be downloaded", lambda _: self._send("GET", url))
        if sha256 and hashlib.sha256(response.content).hexdigest() != sha256.lower():
            raise JobError(f"the SHA-256 of {name} in the store is not the one that was recorded")
        return response.content

    async def upload(self, url: str, content: bytes, name: str) -> None:
        """Writes the object.

        Raises:
            JobError: the store refuses it or does not answer.
        """
        await self._patiently(f"{name} cannot be uploaded", lambda _: self._send("PUT", url, content))

    async def _send(self, method: str, url: str, content: bytes | None = None) -> httpx.Response:
        response = await self._client.request(method, url, content=content)
        _check(response)
        return response

    async def _get(self, url: str, path: Path, patience: _Patience) -> tuple[int, str]:
        digest = hashlib.sha256()
        num_bytes = 0
        with path.open("wb") as file:

            def take(chunk: bytes) -> None:
                file.write(chunk)
                digest.update(chunk)

            async with self._client.stream("GET", url) as response:
                _check(response)
                async for chunk in response.aiter_raw(_CHUNK_BYTES):
                    num_bytes += len(chunk)
                    patience.received(num_bytes)
                    await asyncio.to_thread(take, chunk)
        return num_bytes, digest.hexdigest()

    async def _patiently(self, problem: str, attempt: Callable[[_Patience], Awaitable[T]]) -> T:
        patience = _Patience(self._patience_seconds)
        delay = _FIRST_DELAY_SECONDS
        while True:
            try:
                return await attempt(patience)
            except _Refused as error:
                raise JobError(f"{problem}: {error}") from None
            except httpx.HTTPStatusError as error:
                reason = f"the object store answers {error.response.status_code}"
            except httpx.TransportError as error:
                reason = f"the object store does not answer ({type(error).__name__})"
            except OSError as error:
                if error.errno in DISK_FULL:
                    raise DiskFull(f"{problem}: the worker's disk is full") from error
                raise
            if patience.ends_within(delay):
                raise JobError(f"{problem}: {reason}")
            log.warning("transfer is tried again", problem=problem, reason=reason)
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            delay = min(2 * delay, _MAX_DELAY_SECONDS)


def _check(response: httpx.Response) -> None:
    if response.status_code >= 500 or response.status_code == httpx.codes.TOO_MANY_REQUESTS:
        raise httpx.HTTPStatusError("busy", request=response.request, response=response)
    if not response.is_success:
        raise _Refused(f"the object store answers {response.status_code}")
