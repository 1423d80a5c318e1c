"""Textual inversion: a word in a prompt that stands for vectors out of a file. A1111's `.pt` and `.safetensors`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from gpu_worker.files.cache import CachedModel
from gpu_worker.job import JobError
from gpu_worker.models.weights import Models, read

# By the text encoders of SDXL, in order; a file for SD1.5 has a single tensor.
_SDXL_KEYS = ("clip_l", "clip_g")
# Where vectors go in a call of a text encoder: chunk, position of the first in the chunk's 77, vectors.
Place = tuple[int, int, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Embedding:
    """Vectors of shape (n, width) for each text encoder; none, where it was made for another architecture."""

    vectors: tuple[torch.Tensor, ...]


def load(file: CachedModel, models: Models, _: str) -> Embedding:
    """Reads an embedding for these models. One that does not fit them is no error, as in A1111: clients send all that
    they have, and its name may be a word like others.

    Raises:
        JobError: the file is damaged, or no embedding.
    """
    tensors = read(file.path, file.name)[0]
    if models.is_sdxl and all(key in tensors for key in _SDXL_KEYS):
        found = [tensors[key] for key in _SDXL_KEYS]
    else:
        vectors = [
            tensor for tensor in tensors.values() if tensor.ndim == 2 or (tensor.ndim == 1 and len(tensors) == 1)
        ]
        if len(vectors) != 1 and not all(key in tensors for key in _SDXL_KEYS):
            raise JobError(f"{file.name} is no embedding: it has {len(vectors)} tensors of vectors instead of one")
        found = vectors
    widths = [encoder.model.get_input_embeddings().weight.shape[1] for encoder in models.text_encoders]
    found = [tensor.reshape(-1, tensor.shape[-1]) for tensor in found]
    if [tensor.shape[1] for tensor in found] != widths:
        return Embedding(())
    return Embedding(tuple(tensor.to(models.device, models.dtype) for tensor in found))


@contextmanager
def injected(model: Any, places: Sequence[Place]) -> Iterator[None]:
    """Within it, the model reads the vectors where they belong instead of the tokens there."""

    def put(_: Any, __: Any, output: torch.Tensor) -> None:
        for chunk, start, vectors in places:
            output[chunk, start : start + len(vectors)] = vectors

    hook = model.get_input_embeddings().register_forward_hook(put)
    try:
        yield
    finally:
        hook.remove()
