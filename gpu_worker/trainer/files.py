"""A training's files, to and from the object store: each attempt has a fresh URL, and an outage of the store costs time
alone."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import TypeVar

from esd.training.v1 import training_pb2 as pb
from gpu_worker.files.transfer import Transfer, Unreached, UrlExpired
from gpu_worker.trainer.stream import TrainStream
from services.common.payloads.trainers import is_plain
from services.common.tasks import together

T = TypeVar("T")

OUTAGE_SECONDS = 3600.0  # which a file waits for the store; a training has cost hours or days by then
_MAX_EXPIRED = 10  # URLs in a row: then clocks differ
_PAUSE_SECONDS = 1.0
_URLS_AT_ONCE = 100
_DOWNLOADS_AT_ONCE = 8


class Files:
    """Downloads and uploads of one training, which is told when the store goes away and when it is back."""

    def __init__(self, stream: TrainStream, transfer: Transfer) -> None:
        self._stream = stream
        self._transfer = transfer
        transfer.reach.on_change = self._tell_of_outage

    async def download(
        self, kind: pb.UrlKind, name: str, path: Path, size_bytes: int = 0, sha256: str = "", url: str = ""
    ) -> None:
        """Writes the object to the file. See `attempt` and Transfer.download."""

        async def work(url: str) -> None:
            await self._transfer.download(url, path, name, size_bytes, sha256)

        await self.attempt(kind, name, work, url)

    async def download_all(self, kind: pb.UrlKind, listed: Iterable[pb.InputFile], folder: Path) -> None:
        """Writes a dataset's objects below the folder, some at a time. One that has the name of a folder, which a disk
        does not have beside it as the store does, is left out and told."""
        named = {PurePosixPath(file.name): file for file in listed if is_plain(file.name)}
        folders = {parent for path in named for parent in path.parents}
        for path in sorted(named.keys() & folders):
            self._stream.tell(log=pb.TrainerLog(line=f"left out: {path}, as other files lie in a folder of this name"))
        wanted = [file for path, file in named.items() if path not in folders]
        at_once = asyncio.Semaphore(_DOWNLOADS_AT_ONCE)

        async def download(file: pb.InputFile, url: str) -> None:
            path = folder / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            async with at_once:
                await self.download(kind, file.name, path, url=url)

        await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
        for start in range(0, len(wanted), _URLS_AT_ONCE):
            some = wanted[start : start + _URLS_AT_ONCE]
            urls = await self._stream.urls(kind, [file.name for file in some])
            async with together() as group:
                for file, url in zip(some, urls, strict=True):
                    group.create_task(download(file, url))

    async def upload(self, name: str, content: bytes) -> pb.UploadedFile:
        """Writes the object; answers how it is told of. See `attempt` and Transfer.upload."""
        await self.attempt(pb.URL_KIND_UPLOAD, name, lambda url: self._transfer.upload(url, content, name))
        sha256 = await asyncio.to_thread(lambda: hashlib.sha256(content).hexdigest())
        return pb.UploadedFile(name=name, size_bytes=len(content), sha256=sha256)

    async def attempt(self, kind: pb.UrlKind, name: str, work: Callable[[str], Awaitable[T]], first_url: str = "") -> T:
        """What the work makes of the file's URL: of the first one, if that is given, and of a fresh one each time that
        the store was not reached or takes the URL no more.

        Raises:
            JobError: the work failed for another reason. Unreached: the store is away for too long. UrlExpired: no URL
            is fresh enough.
        """
        away_since, num_expired, urls = None, 0, [first_url] if first_url else []
        while True:
            [url], urls = urls or await self._stream.urls(kind, [name]), []
            try:
                return await work(url)
            except Unreached:
                away_since = away_since or time.monotonic()
                left = away_since + OUTAGE_SECONDS - time.monotonic()
                if left <= 0:
                    raise
                await asyncio.sleep(_PAUSE_SECONDS)
                await self._transfer.reach.wait(left)
            except UrlExpired:
                num_expired += 1
                if num_expired == _MAX_EXPIRED:
                    raise
                await asyncio.sleep(_PAUSE_SECONDS)

    def _tell_of_outage(self) -> None:
        is_away = self._transfer.reach.is_away
        line = "the object store is not reached; files wait until it is" if is_away else "the object store is back"
        self._stream.tell(log=pb.TrainerLog(line=line))
