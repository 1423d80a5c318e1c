"""What prepares the picture that a ControlNet looks at: the modules of A1111's extension that need no weights.

Written from their behaviour, not their code. Pixels are RGB, of shape (height, width, 3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from gpu_worker.pictures.canvas import bounded

Pixels = NDArray[np.uint8]
Module = Callable[[Pixels, float, float], Pixels]

_BLOCK = 64  # pixels of a colour
_SHUFFLE_GRAIN = 256


def prepared(module: str, pixels: Pixels, resolution: int, a: float, b: float, seed: int) -> Pixels:
    """What the module makes of a picture. Most look at it with `resolution` pixels on its shorter side; a and b are
    their thresholds. `seed` is the shuffle's.

    Raises:
        JobError: the picture is too narrow for that.
    """
    if module in _AS_IT_IS:
        return _AS_IT_IS[module](pixels, a, b)
    scaled = _scaled(pixels, resolution)
    if module == "shuffle":
        return _shuffled(scaled, seed)
    return _AT_RESOLUTION[module](scaled, a, b)


def _scaled(pixels: Pixels, resolution: int) -> Pixels:
    height, width = pixels.shape[:2]
    factor = resolution / min(height, width)
    size = bounded(max(1, round(width * factor)), max(1, round(height * factor)))
    return _pixels(cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC if factor > 1 else cv2.INTER_AREA))


def _canny(pixels: Pixels, low: float, high: float) -> Pixels:
    return _grey(cv2.Canny(pixels, low, high))


def _threshold(pixels: Pixels, least: float, _: float) -> Pixels:
    """White where all colours are above it."""
    return _grey(np.where(pixels.min(axis=2) > least, 255, 0))


def _lineart_standard(pixels: Pixels, _: float, __: float) -> Pixels:
    """Dark lines on a light ground become light ones: by how much they are darker than what is around them."""
    x = pixels.astype(np.float32)
    darker = (_blurred(x, 6.0) - x).min(axis=2).clip(0, 255)
    lines = darker[darker > 8]
    return _grey(darker / max(16.0, float(np.median(lines)) if lines.size else 0.0) * 127)


def _scribble_xdog(pixels: Pixels, threshold: float, _: float) -> Pixels:
    """Difference of Gaussians (Winnemöller et al. 2012): white where the fine blur is darker than the coarse one."""
    x = pixels.astype(np.float32)
    darker = (_blurred(x, 5.0) - _blurred(x, 0.5)).min(axis=2).clip(0, 255)
    return _grey(np.where(2 * np.floor(darker) > threshold, 255, 0))


def _tile_resample(pixels: Pixels, rate: float, _: float) -> Pixels:
    if rate < 1.1:
        return pixels
    height, width = pixels.shape[:2]
    size = max(1, int(width / rate)), max(1, int(height / rate))
    return _pixels(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA))


def _colour(pixels: Pixels, _: float, __: float) -> Pixels:
    """Blocks of one colour each."""
    height, width = pixels.shape[:2]
    blocks = max(1, width // _BLOCK), max(1, height // _BLOCK)
    small = cv2.resize(pixels, blocks, interpolation=cv2.INTER_CUBIC)
    return _pixels(cv2.resize(small, (width, height), interpolation=cv2.INTER_NEAREST))


def _luminance(pixels: Pixels, gamma: float, _: float) -> Pixels:
    return _grey(_bent(cv2.cvtColor(pixels, cv2.COLOR_RGB2LAB)[..., 0], gamma))


def _intensity(pixels: Pixels, gamma: float, _: float) -> Pixels:
    return _grey(_bent(cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)[..., 2], gamma))


def _shuffled(pixels: Pixels, seed: int) -> Pixels:
    """The picture's colours, drawn from places that smooth noise says (ControlNet 1.1's content shuffle)."""
    height, width = pixels.shape[:2]
    random = np.random.default_rng(seed)
    x, y = (_noise(random, height, width) * (side - 1) for side in (width, height))
    return _pixels(cv2.remap(pixels, x, y, cv2.INTER_LINEAR))


def _noise(random: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
    """Smooth noise in 0..1."""
    grain = _SHUFFLE_GRAIN
    coarse = random.uniform(0, 1, (height // grain + 2, width // grain + 2)).astype(np.float32)
    smooth = cv2.resize(coarse, (width + 2 * grain, height + 2 * grain), interpolation=cv2.INTER_CUBIC)
    smooth = smooth[grain : grain + height, grain : grain + width]
    spread = smooth.max() - smooth.min()
    return np.asarray((smooth - smooth.min()) / (spread or 1), dtype=np.float32)


def _blurred(x: Any, sigma: float) -> Any:
    return cv2.GaussianBlur(x, (0, 0), sigma)


def _bent(channel: Any, gamma: float) -> Any:
    return (np.asarray(channel, dtype=np.float32) / 255) ** gamma * 255


def _grey(channel: Any) -> Pixels:
    """One channel as three."""
    return _pixels(np.repeat(np.asarray(channel)[..., None], 3, axis=2))


def _pixels(values: Any) -> Pixels:
    return np.asarray(values).clip(0, 255).astype(np.uint8)


_AS_IT_IS: dict[str, Module] = {
    "none": lambda pixels, *_: pixels,
    "inpaint": lambda pixels, *_: pixels,
    "inpaint_only": lambda pixels, *_: pixels,
    "tile_colorfix": lambda pixels, *_: pixels,
    "invert": lambda pixels, *_: 255 - pixels,
    "tile_resample": _tile_resample,
    "recolor_luminance": _luminance,
    "recolor_intensity": _intensity,
}
_AT_RESOLUTION: dict[str, Module] = {
    "canny": _canny,
    "threshold": _threshold,
    "lineart_standard": _lineart_standard,
    "scribble_xdog": _scribble_xdog,
    "blur_gaussian": lambda pixels, sigma, _: _pixels(_blurred(pixels, sigma)),
    "color": _colour,
}
MODULES = {*_AS_IT_IS, *_AT_RESOLUTION, "shuffle"}
