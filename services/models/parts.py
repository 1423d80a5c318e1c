"""Collects a stream of bytes into the parts of an upload, each noted in the import's row once the store has it."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass

from services.common.blobs import MIB, Blobs
from services.common.outbound import Unreachable, UrlRefused
from services.models.import_store import Import, ImportStore

_MIN_PART_BYTES = 5 * MIB  # of S3
_MAX_PARTS = 9_000  # S3 takes 10,000


@dataclass(frozen=True)
class Limits:
    """What an import may take, its time from its first attempt, and how many that have not ended a user may have."""

    max_bytes: int
    max_hours: float
    max_per_user: int  # 0: any number

    @property
    def part_bytes(self) -> int:
        """The size of each part but the last."""
        return max(_MIN_PART_BYTES, -(-self.max_bytes // _MAX_PARTS // MIB) * MIB)


class Parts:
    """Collects bytes into parts; one is being stored while the next is being filled.

    Two buffers that change places hold them, so an import takes twice the size of a part, however long the file.
    """

    def __init__(
        self, blobs: Blobs, imports: ImportStore, key: str, upload_id: str, held: Import, limits: Limits
    ) -> None:
        self._blobs = blobs
        self._imports = imports
        self._key = key
        self._upload_id = upload_id
        self._held = held
        self._limits = limits
        self._received = held.bytes_done
        self._number = len(held.parts)
        self._filling, self._other = bytearray(limits.part_bytes), bytearray(limits.part_bytes)
        self._num_filled = 0
        self._storing: asyncio.Task[tuple[str, int]] | None = None
        self.digest = hashlib.sha256()

    async def add(self, chunk: bytes) -> None:
        """Takes the next bytes.

        Raises:
            UrlRefused: they are too many. Superseded.
        """
        self._received += len(chunk)
        if self._received > self._limits.max_bytes:
            raise UrlRefused(f"more than the {self._limits.max_bytes} bytes that are allowed")
        self.digest.update(chunk)
        left = memoryview(chunk)
        while left:
            taken = left[: len(self._filling) - self._num_filled]
            self._filling[self._num_filled : self._num_filled + len(taken)] = taken
            self._num_filled += len(taken)
            left = left[len(taken) :]
            if self._num_filled == len(self._filling):
                await self._store()

    async def end(self) -> Import:
        """Stores what is left, and answers the import with all its parts.

        Raises:
            UrlRefused: there was nothing, or more than was announced. Unreachable: there was less.
        """
        if self._received == 0:
            raise UrlRefused("the file is empty")
        if self._held.bytes_total is not None and self._received != self._held.bytes_total:
            counts = f"{self._received} bytes came of the {self._held.bytes_total} that were announced"
            raise Unreachable(counts) if self._received < self._held.bytes_total else UrlRefused(counts)
        if self._num_filled:
            await self._store()
        await self._settle(is_last=True)
        if self._held.bytes_total != self._held.bytes_done:
            # The range that was asked for was empty: all parts were there.
            raise Unreachable("the file ended before its last part")
        return self._held

    async def aclose(self) -> None:
        """Lets go of a part that is under way."""
        if self._storing is not None:
            self._storing.cancel()
            await asyncio.gather(self._storing, return_exceptions=True)

    async def _store(self) -> None:
        await self._settle(is_last=False)  # from here on nobody reads the other buffer
        content, self._filling, self._other = self._filling, self._other, self._filling
        if self._num_filled < len(content):
            content = content[: self._num_filled]
        self._num_filled = 0
        self._number += 1
        self._storing = asyncio.create_task(self._put(self._number, content))

    async def _put(self, number: int, content: bytearray) -> tuple[str, int]:
        return await self._blobs.put_part(self._key, self._upload_id, number, content), len(content)

    async def _settle(self, is_last: bool) -> None:
        if self._storing is not None:
            etag, size_bytes = await self._storing
            self._storing = None
            self._held = await self._imports.save_part(self._held, etag, size_bytes, is_last)
