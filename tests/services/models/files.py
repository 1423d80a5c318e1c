"""Owns small files of each kind that clients upload, made without torch."""

import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict
from typing import Any

MIB = 1024 * 1024
TORCH_MAGIC = 0x1950A86A20F9469CFC6C


def safetensors(size: int = 64, name: str = "cond_stage_model.transformer.weight", **changes: Any) -> bytes:
    """A sound file with one tensor of `size` bytes; `changes` are made to the tensor's entry."""
    entry = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]} | changes
    return with_header({name: entry, "__metadata__": {"format": "pt"}}, bytes(size))


def with_header(header: Any, data: bytes) -> bytes:
    """A safetensors file with any header."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tar(
    name: str, content: bytes, form: int = tarfile.USTAR_FORMAT, kind: bytes = tarfile.REGTYPE, **pax: str
) -> bytes:
    """What the original client uploads; `pax` are records of a pax header of the file's own."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        member.type = kind
        member.pax_headers = pax
        archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def sparse_tars(name: str, content: bytes) -> dict[str, bytes]:
    """Tars with a sparse file, by form; those with pax headers are of a gigabyte."""
    pax = {"GNU.sparse.size": str(1 << 30), "GNU.sparse.map": f"0,{len(content)}"}
    return {
        "gnu": tar(name, content, tarfile.GNU_FORMAT, tarfile.GNUTYPE_SPARSE),
        "pax": tar(name, content, tarfile.PAX_FORMAT, **pax),
        # A header for all members counts where a member has one of its own.
        "global": tarfile.TarInfo.create_pax_global_header(pax) + tar(name, content, tarfile.PAX_FORMAT, comment="a"),
    }


def torch_zip(pickled: bytes, name: str = "archive/data.pkl") -> bytes:
    """A torch archive around a pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, pickled)
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def torch_stream(pickled: bytes) -> bytes:
    """A torch file of before 1.6 around a pickle."""
    before = [TORCH_MAGIC, 1001, {"little_endian": True}]
    return b"".join([*(pickle.dumps(value, 2) for value in before), pickled, pickle.dumps([], 2)])


def weights(protocol: int = 2) -> bytes:
    """A pickle that names only what weights need."""
    return pickle.dumps(OrderedDict({"state_dict": {"lora_te_text_model": 1}}), protocol)


class _Command:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        import os

        return os.system, (self.command,)


def malicious(command: str, protocol: int = 2) -> bytes:
    """A pickle that runs a command of the shell when it is loaded."""
    return pickle.dumps({"state_dict": _Command(command)}, protocol)
