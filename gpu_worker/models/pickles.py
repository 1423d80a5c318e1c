"""Reads the weights in a `.ckpt`, `.pt` or `.bin` without running what its pickle asks for.

Only the few names that rebuild tensors are real. Everything else, such as a trainer's callbacks or an attacker's
`os.system`, becomes an inert object, so that old training checkpoints load too (torch's weights_only refuses those).
"""

from __future__ import annotations

import collections
import pickle
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from gpu_worker.job import JobError

_REAL: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch", "FloatStorage"): torch.FloatStorage,
    ("torch", "HalfStorage"): torch.HalfStorage,
    ("torch", "BFloat16Storage"): torch.BFloat16Storage,
    ("torch", "DoubleStorage"): torch.DoubleStorage,
    ("torch", "LongStorage"): torch.LongStorage,
    ("torch", "IntStorage"): torch.IntStorage,
}


# Tensors may share numbers or repeat them, and become as large as they say once they are used. Tied weights share.
_MAX_TIMES_SHARED = 2
# Where files keep their weights: checkpoints, embeddings, and the family of ESRGAN.
_INNER = ("state_dict", "string_to_param", "params_ema", "params-ema", "params")


class _Inert:
    """Accepts whatever a pickle does with an object, and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> _Inert:
        return self

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def __hash__(self) -> int:
        return id(self)

    def append(self, _: Any) -> None:
        pass

    def extend(self, _: Any) -> None:
        pass

    add = append


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _REAL.get((module, name), _Inert)


def _load(file: Any, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


# torch.load takes a module; these are the two names of it that it uses.
_SAFE_PICKLE: Any = SimpleNamespace(__name__="gpu_worker.models.pickles", Unpickler=_Unpickler, load=_load)


def read(path: Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a pickled checkpoint, by name.

    Raises:
        JobError: the file is damaged, truncated, or holds no weights.
    """
    content = contents(path, name)
    for inner in _INNER:
        if isinstance(content.get(inner), dict):
            content = content[inner]
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and torch.is_tensor(value)}
    if not tensors:
        raise JobError(f"{name} holds no weights")
    check_size(tensors.values(), path, name)
    return tensors


def contents(path: Path, name: str) -> dict[Any, Any]:
    """What a pickled file holds; nothing, where that is no dictionary.

    Raises:
        JobError: the file is damaged or truncated.
    """
    try:
        _check_container(path, name)
        content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_SAFE_PICKLE)
    except JobError:
        raise
    except Exception as error:  # a broken pickle raises anything
        raise JobError(f"{name} is damaged or truncated: it cannot be read as a checkpoint") from error
    return content if isinstance(content, dict) else {}


def check_size(tensors: Iterable[torch.Tensor], path: Path, name: str) -> None:
    """Refuses tensors of a file that would be much larger than it.

    Raises:
        JobError.
    """
    file_bytes, num_bytes = path.stat().st_size, sum(tensor.nbytes for tensor in tensors)
    if num_bytes > _MAX_TIMES_SHARED * file_bytes:
        raise JobError(f"{name} is damaged: its tensors would have {num_bytes} bytes, the file has {file_bytes}")


def _check_container(path: Path, name: str) -> None:
    """Refuses what torch.load() would unpack into far more memory or disk than the file has bytes.

    Raises:
        JobError.
    """
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"  # what torch goes by
    if not is_zip:
        if tarfile.is_tarfile(path):
            raise JobError(f"{name} is a tar archive as torch wrote it before 0.2, which is not read here")
        return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(member.filename.endswith("/constants.pkl") for member in members):
        raise JobError(f"{name} is a TorchScript program, not a checkpoint")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise JobError(f"{name} is compressed, which torch's own archives never are: save it anew with torch.save")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise JobError(f"{name} is damaged: its members have more bytes than the file")
