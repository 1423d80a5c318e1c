"""Scans the pickles of torch files for the code that they would call, opcode by opcode; nothing is ever unpickled.

What is allowed is a list of names. Everything else is refused, whether or not it would do harm.
"""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
from pathlib import PurePosixPath
from typing import IO, Any

MAX_PICKLE_BYTES = 8 * 1024 * 1024  # those of checkpoints have some hundred kilobytes
_MAX_OPCODES = 2_000_000
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # torch/serialization.py, the stream format before 1.6
_TORCH_STREAM_PICKLES = 5  # magic, protocol, system, the object, storage keys
# The records at the end of a zip, APPNOTE 4.3.14 to 4.3.16.
_END = struct.Struct("<4s4H2LH")
_END_64_LOCATOR = struct.Struct("<4sLQL")
_END_64 = struct.Struct("<4sQ2H2L4Q")

# Globals that pickles of weights need, checkpoints of Lightning included; none of them runs code of the file's choice.
_ALLOWED = {
    "collections": {"OrderedDict"},
    "_codecs": {"encode"},
    "__builtin__": {"set"},
    "builtins": {"set"},
    "torch": {
        "BFloat16Storage", "BoolStorage", "ByteStorage", "CharStorage", "DoubleStorage", "FloatStorage", "HalfStorage",
        "IntStorage", "LongStorage", "ShortStorage", "UntypedStorage", "Size", "device", "bfloat16", "float16",
        "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool",
    },
    "torch.storage": {"TypedStorage", "UntypedStorage", "_TypedStorage", "_UntypedStorage"},
    "torch._utils": {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter"},
    "torch.nn.parameter": {"Parameter"},
    "torch.nn.modules.container": {"ParameterDict"},
    "numpy": {"dtype", "ndarray"},
    "numpy.core.multiarray": {"scalar", "_reconstruct"},
    "numpy._core.multiarray": {"scalar", "_reconstruct"},
    "pytorch_lightning.callbacks": {"model_checkpoint"},
    "pytorch_lightning.callbacks.model_checkpoint": {"ModelCheckpoint"},
}  # fmt: skip


class Refused(Exception):
    """The content is not what its name says, or not safe; the message is a reason in words."""


def scan_archive(file: IO[bytes]) -> list[str]:
    """Scans all pickles of a torch archive and answers the strings in them, among which are the names of tensors."""
    strings: list[str] = []
    try:
        _check_directory(file)
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            # torch finds its members whatever the case of their names.
            pickles = [member for member in members if member.filename.lower().endswith(".pkl")]
            if not any(PurePosixPath(member.filename).name.lower() == "data.pkl" for member in pickles):
                raise Refused("is a zip archive without data.pkl, so no torch file")
            _check_members(members, file.seek(0, io.SEEK_END))
            if sum(member.file_size for member in pickles) > MAX_PICKLE_BYTES:
                raise Refused(f"has pickles of more than {MAX_PICKLE_BYTES} bytes")
            for member in pickles:
                strings += _scan(io.BytesIO(archive.read(member)))[0]
    except (zipfile.BadZipFile, struct.error, EOFError, ValueError, NotImplementedError) as error:
        raise Refused(f"is truncated or no sound zip archive: {error}") from None
    return strings


def _check_members(members: list[zipfile.ZipInfo], size: int) -> None:
    """Checks that the members are stored as they are and once, as torch writes them. It would inflate others too, into
    memory and a thousand times as large as they came.

    Raises:
        Refused.
    """
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise Refused(f"has {member.filename} compressed or encrypted, which torch's own archives never have")
    if (num_bytes := sum(member.file_size for member in members)) > size:
        raise Refused(f"is corrupt: its members have {num_bytes} bytes, the archive has {size}")


def _check_directory(file: IO[bytes]) -> None:
    """Checks that the directory lies where the end of the zip says, and right before it.

    Some readers go to the place that is said, others count back: ours must not scan another directory than torch reads.

    Raises:
        Refused.
    """
    end = file.seek(-_END.size, io.SEEK_END)
    signature, *_, length, start, num_comment = _END.unpack(file.read(_END.size))
    if signature != b"PK\5\6" or num_comment:
        raise Refused("is truncated or no sound zip archive: it does not end with its directory")
    locator_at = end - _END_64_LOCATOR.size
    if locator_at >= _END_64.size:
        file.seek(locator_at)
        signature, _, said, _ = _END_64_LOCATOR.unpack(file.read(_END_64_LOCATOR.size))
        if signature == b"PK\6\7":
            end = locator_at - _END_64.size
            file.seek(end)
            signature, *_, length, start = _END_64.unpack(file.read(_END_64.size))
            if signature != b"PK\6\6" or said != end:
                raise Refused("is truncated or no sound zip archive: it has no end where it should be")
    if start + length != end:
        raise Refused("is truncated or no sound zip archive: its directory lies elsewhere than it says")


def scan_stream(file: IO[bytes]) -> list[str]:
    """Scans the pickles with which a torch file of before 1.6 begins."""
    strings, numbers = _scan(file)
    if _TORCH_MAGIC not in numbers:
        raise Refused("is a pickle, but no torch file")
    for _ in range(_TORCH_STREAM_PICKLES - 1):
        strings += _scan(file)[0]
    return strings


def _scan(file: IO[bytes]) -> tuple[list[str], list[int]]:
    """Reads one pickle opcode by opcode, without running it, and answers its strings and numbers.

    Raises:
        Refused: it names a global that weights do not need, or hides which.
    """
    strings: list[str] = []
    numbers: list[int] = []
    # What lies on top of the stack: strings that were pushed since the last opcode that did anything else.
    top: list[str] = []
    memo: dict[int, str | None] = {}
    try:
        for number, (opcode, given, _) in enumerate(pickletools.genops(file)):
            if number >= _MAX_OPCODES:
                raise Refused(f"has a pickle of more than {_MAX_OPCODES} opcodes, which no weights need")
            argument: Any = given  # of a type that the opcode decides
            name = opcode.name
            if name in {"GLOBAL", "INST"}:
                _allow(*argument.split(" ", 1))
            elif name == "STACK_GLOBAL":
                if len(top) < 2:
                    raise Refused("hides the names of the code that its pickle calls")
                _allow(*top[-2:])
            elif name.startswith("EXT"):
                raise Refused("names code by number in its pickle")
            if name in {"MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"}:
                memo[len(memo) if name == "MEMOIZE" else argument] = top[-1] if top else None
            elif name in {"GET", "BINGET", "LONG_BINGET"}:
                remembered = memo.get(argument)
                top = [] if remembered is None else [*top, remembered]
            elif "UNICODE" in name or "STRING" in name:
                text = argument if isinstance(argument, str) else ""
                strings.append(text)
                top.append(text)
            elif name != "FRAME":
                top = []
                if type(argument) is int:
                    numbers.append(argument)
    except (ValueError, KeyError, IndexError, AttributeError, UnicodeError) as error:
        raise Refused(f"has a truncated or corrupt pickle: {error}") from None
    return strings, numbers


def _allow(module: str, name: str) -> None:
    if name not in _ALLOWED.get(module, ()):
        raise Refused(f"has code in its pickle: {module}.{name} is not among what weights need")
