"""Upscalers that are models, of the ESRGAN family and others that spandrel knows, tile by tile.

spandrel is optional. It declares torchvision, of which two of its architectures use three names; torchvision has no
build for a torch without CUDA, and transformers misbehaves beside a broken one. So spandrel is installed alone, and
those names are there only while it is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Generator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from gpu_worker.files.cache import CachedModel
from gpu_worker.job import JobError
from gpu_worker.models.weights import read

TILE = 256  # pixels each way of what is scaled at once
OVERLAP = 32  # pixels that neighbours share, over which one goes over into the other
_TORCHVISION = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
_MAX_PASSES = 3
_MAX_PIXELS = 2**27  # of what a pass makes


@dataclass(frozen=True, eq=False)
class Upscaler:
    """A model in memory that makes a picture larger by a whole factor."""

    name: str
    model: Any
    scale: int
    device: torch.device
    dtype: torch.dtype


def load(file: CachedModel, device: str) -> Upscaler:
    """Reads an upscaler: fp16 on CUDA where the model can be that, else fp32.

    Raises:
        JobError: the file is damaged or no upscaler of colour pictures, or spandrel is not there.
    """
    spandrel = _spandrel()
    weights: Any = read(file.path, file.name)[0]
    try:
        found: Any = spandrel.ModelLoader(device="cpu").load_from_state_dict(weights)
    except spandrel.UnsupportedModelError:
        raise JobError(f"{file.name} is no upscaler of an architecture that is known") from None
    except Exception:
        raise JobError(f"{file.name} is damaged: it cannot be read as an upscaler") from None
    if not isinstance(found, spandrel.ImageModelDescriptor) or (found.input_channels, found.output_channels) != (3, 3):
        raise JobError(f"{file.name} does not make one colour picture of another")
    is_half = device == "cuda" and found.supports_half
    dtype = torch.float16 if is_half else torch.float32
    found.model.requires_grad_(False)
    return Upscaler(file.name, found.eval().to(torch.device(device), dtype), found.scale, torch.device(device), dtype)


def upscaled(upscaler: Upscaler, image: Image.Image, size: tuple[int, int]) -> Generator[None, None, Image.Image]:
    """The picture at a size in pixels: scaled by the model as often as it is too small, and then by Lanczos to what was
    wanted. Lets others go first between tiles.

    Raises:
        JobError: the model would make too many pixels on the way.
    """
    result = image.convert("RGB")
    for _ in range(_MAX_PASSES):
        if result.width >= size[0] and result.height >= size[1]:
            break
        if result.width * result.height * upscaler.scale**2 > _MAX_PIXELS:
            raise JobError(
                f"{upscaler.name} would make {result.width * upscaler.scale}x{result.height * upscaler.scale} pixels "
                f"on the way; at most {_MAX_PIXELS} are possible"
            )
        result = Image.fromarray((yield from _pass(upscaler, np.asarray(result))))
    return result if result.size == size else result.resize(size, Image.Resampling.LANCZOS)


def _pass(upscaler: Upscaler, pixels: NDArray[np.uint8]) -> Generator[None, None, NDArray[np.uint8]]:
    """The picture larger by the model's factor. Rows of tiles are put together first, so that little is in memory as
    numbers with a fraction."""
    height, width = pixels.shape[:2]
    scale, rows = upscaler.scale, []
    for top in _starts(height):
        tiles = []
        for left in _starts(width):
            yield None
            tiles.append(_tile(upscaler, pixels[top : top + TILE, left : left + TILE]))
        rows.append(_joined(tiles, _starts(width), scale, axis=1).round().astype(np.uint8))
    joined = _joined([row.astype(np.float32) for row in rows], _starts(height), scale, axis=0)
    return joined.round().clip(0, 255).astype(np.uint8)


def _starts(length: int) -> list[int]:
    """Where the tiles of an edge begin: as few as are needed, evenly."""
    if length <= TILE:
        return [0]
    count = -(-(length - OVERLAP) // (TILE - OVERLAP))
    return [round(index * (length - TILE) / (count - 1)) for index in range(count)]


def _tile(upscaler: Upscaler, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].to(upscaler.device, upscaler.dtype) / 255
    larger = upscaler.model(x)[0].float().clamp(0, 1).permute(1, 2, 0) * 255
    if not bool(torch.isfinite(larger).all()):
        raise JobError(f"{upscaler.name} produced NaN (not a number) instead of a picture; its weights may be damaged")
    result: NDArray[np.float32] = larger.cpu().numpy()
    return result


def _joined(tiles: list[NDArray[np.float32]], starts: list[int], scale: int, axis: int) -> NDArray[np.float32]:
    """Tiles along an axis as one; where two lie over each other, the one before goes over into the one behind."""
    result = tiles[0]
    for tile, start in zip(tiles[1:], starts[1:], strict=True):
        shared = result.shape[axis] - start * scale
        ramp = ((np.arange(shared, dtype=np.float32) + 0.5) / shared).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        before, over = np.split(result, [start * scale], axis)
        own, rest = np.split(tile, [shared], axis)
        result = np.concatenate([before, over * (1 - ramp) + own * ramp, rest], axis)
    return result


def _spandrel() -> Any:
    """The library.

    Raises:
        JobError: this worker does not have it.
    """
    if importlib.util.find_spec("spandrel") is None:
        raise JobError(
            "upscalers that are models need the library spandrel, which this worker does not have; "
            "possible: Lanczos, Nearest"
        )
    if "spandrel" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        return importlib.import_module("spandrel")
    stand_ins = {name: ModuleType(name) for name in _TORCHVISION}
    for name in ("InterpolationMode", "rotate", "normalize"):
        setattr(stand_ins[_TORCHVISION[-1]], name, object)
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module("spandrel")
    finally:
        for name in stand_ins:
            del sys.modules[name]
