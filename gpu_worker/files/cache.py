"""Model files on the worker's disk, by content: one folder per cache key, the least recently used ones go first, before
one that needs their room is fetched.

All workers of a machine share the folder. An entry comes and goes by an atomic rename, and whoever uses one holds a
shared lock on it (flock(2), which ends with the process), so that nobody evicts it. The object may be an uncompressed
tar around the model, whatever its name says (contract 10.2): the tar magic decides, and only the bytes of the inner
file are taken, never a path.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import shutil
import tarfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from uuid import uuid4

import structlog

from gpu_worker.files.transfer import DISK_FULL, DiskFailed, Transfer
from gpu_worker.job import JobError

if TYPE_CHECKING:
    from esd.worker.v1 import worker_pb2

log = structlog.get_logger()

_TAR_MAGIC = b"ustar"
_TAR_MAGIC_AT = 257  # POSIX 1003.1, the header's `magic`
_MODEL_ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".onnx")
_ABANDONED_SECONDS = 3600.0
_CHANGING = "changing"
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class CachedModel:
    """A model file here. `sha256` is that of the file itself, also when it came in a tar."""

    key: str
    type: str
    name: str
    path: Path
    sha256: str


@dataclass(frozen=True)
class _Entry:
    sha256: str
    size_bytes: int


class ModelCache:
    """The folder, bounded in bytes. Files in use are never removed."""

    def __init__(self, folder: Path, max_bytes: int, transfer: Transfer) -> None:
        self._models = folder / "models"
        self._partial = folder / "partial"
        self._lock_files = folder / "locks"  # empty files; they stay, as one that is removed would lock nothing
        self._max_bytes = max_bytes
        self._transfer = transfer
        self._locks: dict[str, asyncio.Lock] = {}
        for path in (self._models, self._partial, self._lock_files):
            path.mkdir(parents=True, exist_ok=True)
        self._sweep_partial()

    @asynccontextmanager
    async def hold(self, model: worker_pb2.ModelFile) -> AsyncIterator[CachedModel]:
        """The model's file, fetched if it is not here, and kept here while the context lasts.

        Raises:
            JobError: it cannot be had, or is not what was recorded. OSError: the disk is broken.
        """
        folder = self._models / _folder_name(model.cache_key)
        with self._lock(folder.name, fcntl.LOCK_SH):  # whoever has it exclusively renames a folder: no wait to speak of
            async with self._locks.setdefault(folder.name, asyncio.Lock()):
                entry = _read_entry(folder)
                if entry is None:
                    entry = await self._fetch(model, folder)
            os.utime(folder)
            yield CachedModel(model.cache_key, model.type, model.name, folder / "model", entry.sha256)

    async def _fetch(self, model: worker_pb2.ModelFile, folder: Path) -> _Entry:
        # Its name says what it will hold, to whoever makes room meanwhile.
        partial = self._partial / f"{model.size_bytes}.{uuid4().hex}"
        began = time.monotonic()
        try:
            while (entry := await self._download(model, partial)) is None:
                # Others fill the disk too. What nobody uses goes, piece by piece, before the job does.
                await asyncio.to_thread(shutil.rmtree, partial, True)
                if not await asyncio.to_thread(self._make_room, max(model.size_bytes, 1)):
                    raise DiskFailed(f"{model.name} cannot be downloaded: the worker's disk is full")
            await asyncio.to_thread(self._install, partial, folder)
        finally:
            await asyncio.to_thread(shutil.rmtree, partial, True)
        log.info("model fetched", name=model.name, bytes=entry.size_bytes, seconds=round(time.monotonic() - began, 2))
        return entry

    async def _download(self, model: worker_pb2.ModelFile, partial: Path) -> _Entry | None:
        """Makes the folder, with all that an entry has; None if there is no room for it on the disk."""
        try:
            if not await asyncio.to_thread(self._begin, partial, model.size_bytes):
                return None
            path = partial / "model"
            sha256 = await self._transfer.download(model.url, path, model.name, model.size_bytes, model.sha256)
            if is_tar(path):
                sha256 = await asyncio.to_thread(_unpack, path, model.name)
            entry = _Entry(sha256, path.stat().st_size)
            (partial / "entry.json").write_text(json.dumps(asdict(entry)))
        except (DiskFailed, OSError) as error:
            if isinstance(error, OSError) and error.errno not in DISK_FULL:
                raise
            return None
        return entry

    def _begin(self, partial: Path, size_bytes: int) -> bool:
        """Makes the folder and room for what will be in it. Answers whether there is some."""
        partial.mkdir()
        self._make_room()
        return shutil.disk_usage(partial).free >= size_bytes

    def _install(self, partial: Path, folder: Path) -> None:
        """Makes the fetched folder an entry, unless another worker was faster. One at a time on this machine."""
        removed = None
        with self._lock(_CHANGING, fcntl.LOCK_EX):
            if _read_entry(folder) is not None:
                return
            if folder.exists():
                removed = self._take_out(folder)
            partial.rename(folder)
        if removed:
            shutil.rmtree(removed, ignore_errors=True)

    def _make_room(self, at_least_bytes: int = 0) -> int:
        """Removes damaged entries, and then the least recently used until all that is being fetched on this machine
        fits under the bound and on the disk, and at least so many bytes if there are. Answers how many entries went."""
        num_removed = 0
        with self._lock(_CHANGING, fcntl.LOCK_EX):
            found = []
            for folder in self._models.iterdir():
                entry = _read_entry(folder)
                found.append((folder.stat().st_mtime if entry else 0.0, folder, entry.size_bytes if entry else 0))
            wanted_bytes, missing_bytes = self._under_way()
            excess_bytes = max(
                at_least_bytes,
                sum(entry_bytes for _, _, entry_bytes in found) + wanted_bytes - self._max_bytes,
                missing_bytes - shutil.disk_usage(self._models).free,
            )
            for used_at, folder, entry_bytes in sorted(found):
                if used_at and excess_bytes <= 0:
                    break
                try:
                    with self._lock(folder.name, fcntl.LOCK_EX | fcntl.LOCK_NB):
                        removed = self._take_out(folder)
                except BlockingIOError:
                    continue  # in use
                shutil.rmtree(removed, ignore_errors=True)
                log.info("model evicted from disk", folder=folder.name, bytes=entry_bytes)
                excess_bytes -= entry_bytes
                num_removed += 1
        return num_removed

    def _under_way(self) -> tuple[int, int]:
        """Bytes of the models that are being fetched on this machine, and how many of them are not here yet."""
        self._sweep_partial()
        wanted_bytes = missing_bytes = 0
        for path in self._partial.iterdir():
            size_bytes, is_fetched, _ = path.name.partition(".")
            if is_fetched:  # and not being removed
                wanted_bytes += int(size_bytes)
                with suppress(FileNotFoundError):
                    missing_bytes += max(0, int(size_bytes) - sum(item.stat().st_size for item in path.iterdir()))
        return wanted_bytes, missing_bytes

    def _take_out(self, folder: Path) -> Path:
        """Ends an entry at once, whole: a worker that is killed while it removes the files leaves no half of it."""
        return folder.rename(self._partial / uuid4().hex)

    @contextmanager
    def _lock(self, name: str, operation: int) -> Iterator[None]:
        """Holds the lock of that name. Each use opens the file anew, and so locks against this process too."""
        with (self._lock_files / name).open("wb") as file:
            fcntl.flock(file, operation)
            yield

    def _sweep_partial(self) -> None:
        """Removes what a killed worker left. Young ones may be another worker's download."""
        for path in self._partial.iterdir():
            try:
                changed_at = max(item.stat().st_mtime for item in (path, *path.iterdir()))
            except FileNotFoundError:
                continue  # its worker has just removed it
            if time.time() - changed_at > _ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def is_tar(path: Path) -> bool:
    """Whether the file's bytes are a tar, by the magic in its first header."""
    with path.open("rb") as file:
        file.seek(_TAR_MAGIC_AT)
        return file.read(len(_TAR_MAGIC)) == _TAR_MAGIC


def _unpack(path: Path, name: str) -> str:
    """Leaves of the tar the model in it, and answers its SHA-256: the file of that name, else the largest model.

    The content is moved to the start of the file, so that it takes no room of its own and is no longer than the tar.
    """
    try:
        with path.open("r+b") as file:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                found = _find_model(tar, name)
            digest = hashlib.sha256()
            for position in range(0, found.size, _CHUNK_BYTES):
                file.seek(found.offset_data + position)
                chunk = file.read(min(_CHUNK_BYTES, found.size - position))
                digest.update(chunk)
                file.seek(position)
                file.write(chunk)
            if file.tell() != found.size:
                raise tarfile.ReadError("unexpected end of data")
            file.truncate()
    except (tarfile.TarError, ValueError):  # of numbers in its headers that are none
        raise JobError(f"{name} is a tar archive that is damaged or truncated") from None
    return digest.hexdigest()


def _find_model(tar: tarfile.TarFile, name: str) -> tarfile.TarInfo:
    files = [member for member in tar if member.isreg()]
    # Those can be any number of times as large as the archive; other files' content lies in it byte for byte.
    if any(member.issparse() for member in files):
        raise JobError(f"{name} is a tar archive of sparse files: pack it without --sparse")
    named = [member for member in files if PurePosixPath(member.name).name == name]
    models = [member for member in files if member.name.lower().endswith(_MODEL_ENDINGS)]
    if not (candidates := named or models):
        raise JobError(f"{name} is a tar archive without a model in it")
    return max(candidates, key=lambda member: member.size)


def _read_entry(folder: Path) -> _Entry | None:
    """The entry in the folder; None if there is none, or not all of it."""
    try:
        entry = _Entry(**json.loads((folder / "entry.json").read_text()))
        return entry if (folder / "model").stat().st_size == entry.size_bytes else None
    except (OSError, ValueError, TypeError):
        return None


def _folder_name(cache_key: str) -> str:
    """The key itself where it is a SHA-256, else a hash of it: keys may hold any character."""
    if len(cache_key) == 64 and all(character in "0123456789abcdef" for character in cache_key):
        return cache_key
    return hashlib.sha256(cache_key.encode()).hexdigest()
