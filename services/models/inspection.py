"""Looks at what arrived under a model's name, by ranges, before anybody loads it. Nothing is ever unpickled here.

A `.safetensors` must have a sound header whose tensors fill the file exactly; a `.ckpt`, `.pt`, `.pth` or `.bin` must
be a torch archive (zip, or the older stream of pickles) whose pickles name only what weights need. A tar is looked
into, whatever its name: the original client wraps each file into one (contract 10.2). What has another name passes.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any, cast

from services.common.structs import most_values
from services.models.pickles import MAX_PICKLE_BYTES, Refused, scan_archive, scan_stream
from services.models.recognition import UNKNOWN, Shapes, recognise

MODEL_SUFFIXES = frozenset({".safetensors", ".ckpt", ".pt", ".pth", ".bin"})
# Beyond any model of these kinds: headers have some hundred kilobytes and, with a trainer's notes, a few megabytes.
MAX_HEADER_BYTES = 16 * 1024 * 1024
_MAX_HEADER_VALUES = 500_000
_MAX_MEMBERS = 100
_MAX_DIMENSIONS = 32
_MAX_LONG_HEADER_BYTES = 64 * 1024
_READ_AHEAD_BYTES = 256 * 1024
_BLOCK = 512  # of a tar
# Those that say something of members after them; XGLTYPE of all, GNUTYPE_LONGLINK of no file.
_LONG_HEADERS = {
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
}  # fmt: skip
_SPARSE = "is a tar of sparse files: pack it without --sparse"
_DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Findings:
    """What a file turned out to be. `format` is safetensors, torch, or empty for what is no model; `kind` and
    `architecture` are words of recognition.py."""

    format: str = ""
    architecture: str = UNKNOWN
    kind: str = UNKNOWN


class RangedFile(io.RawIOBase):
    """A read-only file of which `fetch(first, last)` answers the bytes, both ends included. Wrap it in a buffer."""

    def __init__(self, size: int, fetch: Callable[[int, int], bytes]) -> None:
        self._size, self._fetch, self._position = size, fetch, 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """The position."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves, without fetching."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError("negative seek position")  # zipfile makes an error of its own from it
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fetches what fits into the buffer."""
        count = min(len(buffer), self._size - self._position)
        if count <= 0:
            return 0
        content = self._fetch(self._position, self._position + count - 1)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)


def inspect(name: str, size: int, fetch: Callable[[int, int], bytes]) -> Findings:
    """What the object `name` of `size` bytes is. Blocks while it fetches.

    Raises:
        Refused: with a reason.
    """
    file = io.BufferedReader(RangedFile(size, fetch), _READ_AHEAD_BYTES)
    file.seek(257)
    if file.read(5) == b"ustar":
        return _inspect_tar(file, size)
    return _inspect_file(name, file, 0, size)


def _inspect_tar(file: IO[bytes], size: int) -> Findings:
    models = [
        found
        for name, start, length in _members(file, size)
        if (found := _inspect_file(name, file, start, length)).format
    ]
    if not models:
        raise Refused("is a tar without a model in it")
    return models[0]


def _members(file: IO[bytes], size: int) -> Iterator[tuple[str, int, int]]:
    """Name, start and length of each regular file of a tar. Read by hand: tarfile reads long headers unbounded.

    Sparse files are refused: a kilobyte of archive can be a terabyte of zeros on the disk that it is unpacked to.
    """
    start = 0
    longer: dict[str, str] = {}  # what a long header says of the member after it
    for _ in range(_MAX_MEMBERS):
        file.seek(start)
        block = file.read(_BLOCK)
        if not any(block):
            return
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            name, length = longer.get("path", member.name), int(longer.get("size", member.size))
        except (tarfile.HeaderError, ValueError) as error:
            raise Refused(f"is a truncated or corrupt tar: {error} at byte {start}") from None
        content = start + _BLOCK
        if length < 0 or content + length > size:
            raise Refused(f"is truncated: {content + length - size} bytes of {name!r} in its tar are missing")
        start = content + -(-length // _BLOCK) * _BLOCK
        if member.type in _LONG_HEADERS:
            if length > _MAX_LONG_HEADER_BYTES:
                raise Refused(f"has a header of {length} bytes in its tar, {_MAX_LONG_HEADER_BYTES} are allowed")
            text = file.read(length)
            if b"GNU.sparse." in text:
                raise Refused(_SPARSE)
            longer |= _long_header(member.type, text)
            continue
        if member.type == tarfile.GNUTYPE_SPARSE:
            raise Refused(_SPARSE)
        longer = {}
        if member.isreg():
            yield name, content, length
    raise Refused(f"is a tar of more than {_MAX_MEMBERS} members")


def _long_header(kind: bytes, content: bytes) -> dict[str, str]:
    """Path and size from a GNU long name or from the records (`<length> <key>=<value>`) of a pax header."""
    text = content.decode("utf-8", "surrogateescape")
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": text.rstrip("\0")}
    if kind not in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
        return {}
    records = (record.partition(" ")[2].partition("=") for record in text.splitlines())
    return {key: value for key, _, value in records if key in {"path", "size"}}


def _inspect_file(name: str, file: IO[bytes], start: int, size: int) -> Findings:
    suffix = PurePosixPath(name).suffix.lower()
    if suffix not in MODEL_SUFFIXES:
        return Findings()
    if size == 0:
        raise Refused("is empty")
    file.seek(start)
    if suffix == ".safetensors":
        return _findings("safetensors", _safetensors_shapes(file, size))
    beginning = file.read(4)
    file.seek(start)
    if beginning == b"PK\x03\x04":
        strings = scan_archive(cast(IO[bytes], _Window(file, start, size)))
    elif beginning[:1] == b"\x80":
        strings = scan_stream(io.BytesIO(file.read(min(size, MAX_PICKLE_BYTES))))
    else:
        raise Refused(f"is no torch file: it begins with {beginning!r}")
    return _findings("torch", dict.fromkeys(strings, ()))


def _findings(form: str, shapes: Shapes) -> Findings:
    kind, architecture = recognise(shapes)
    return Findings(form, architecture, kind)


class _Window(RangedFile):
    """A part of a file as a file, for zipfile, which reads its directory at once, of whatever size it says it is."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        def fetch(first: int, last: int) -> bytes:
            file.seek(start + first)
            return file.read(last + 1 - first)

        super().__init__(size, fetch)

    def read(self, count: int = -1) -> bytes:
        left = max(0, self._size - self._position)
        count = left if count < 0 else min(count, left)
        if count > MAX_PICKLE_BYTES:
            raise Refused(f"has a directory of {count} bytes, {MAX_PICKLE_BYTES} are allowed")
        return super().read(count) or b""


def _safetensors_shapes(file: IO[bytes], size: int) -> Shapes:
    """Checks a safetensors header against the size of its file and answers the shapes of its tensors."""
    length = int.from_bytes(file.read(8), "little")
    if size < 10:
        raise Refused(f"is truncated: {size} bytes cannot be a safetensors file")
    if length > MAX_HEADER_BYTES:
        raise Refused(
            f"is no safetensors file: a header of {length} bytes is announced, {MAX_HEADER_BYTES} are allowed"
        )
    if 8 + length > size:
        raise Refused(f"is truncated: its header alone has {length} bytes, the file {size}")
    text = file.read(length)
    if most_values(text) > _MAX_HEADER_VALUES:  # each becomes a hundred times as large as it is written
        raise Refused(f"has a header of more than {_MAX_HEADER_VALUES} values, which no model here needs")
    try:
        header = json.loads(text.decode())
    except (ValueError, RecursionError):
        raise Refused("is no safetensors file: its header is not JSON") from None
    if not isinstance(header, dict):
        raise Refused("is no safetensors file: its header is not a JSON object")
    header.pop("__metadata__", None)
    if not header:
        raise Refused("holds no tensors")
    spans = sorted(_span(name, tensor) for name, tensor in header.items())
    end = 0
    for first, last, name in spans:
        if first != end:
            kind = "overlap" if first < end else "leave a gap"
            raise Refused(f"is corrupt: its tensors {kind} at {name}")
        end = last
    data = size - 8 - length
    if end > data:
        raise Refused(f"is truncated: {end - data} of {end} bytes of its tensors are missing")
    if end < data:
        raise Refused(f"is corrupt: {data - end} bytes follow its last tensor")
    return {name: tensor["shape"] for name, tensor in header.items()}


def _span(name: str, tensor: Any) -> tuple[int, int, str]:
    """Where a tensor lies, after its shape and type were found to agree with that."""
    try:
        first, last = tensor["data_offsets"]
        bits = _DTYPE_BITS[tensor["dtype"]]
        shape = tensor["shape"]
        if len(shape) > _MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, first, last)):
            raise ValueError
        bits *= math.prod(shape)
    except (KeyError, TypeError, ValueError):
        raise Refused(f"is corrupt: the header's entry of tensor {name} is malformed") from None
    if (last - first) * 8 != bits:
        raise Refused(f"is corrupt: tensor {name} has {last - first} bytes, its shape and type need {bits // 8}")
    return first, last, name
