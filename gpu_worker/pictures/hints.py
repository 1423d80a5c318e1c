"""What each ControlNet unit looks at: its picture, prepared by its module and brought to the size of a pass.

OpenCV and NumPy only, so that it happens beside the GPU thread.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gpu_worker.pictures import canvas as canvases
from gpu_worker.pictures import preprocessors
from gpu_worker.pictures.canvas import Canvas
from gpu_worker.pictures.preprocessors import Pixels
from services.common.payloads import Generation, Img2Img, Txt2Img, pictures
from services.common.payloads.controlnet import (
    CROPPED,
    FILLED,
    HIGH_RES,
    INPAINT,
    INPAINT_ONLY,
    LOW_RES,
    STRETCHED,
    Unit,
)
from services.common.payloads.img2img import CROP_AND_RESIZE, JUST_RESIZE, LATENT_UPSCALE, RESIZE_AND_FILL

_FEW_COLOURS = 200
_MASKED = 127


_RESIZE_MODES = {JUST_RESIZE: STRETCHED, CROP_AND_RESIZE: CROPPED, RESIZE_AND_FILL: FILLED, LATENT_UPSCALE: STRETCHED}
_SOFT_EDGE = 7  # pixels around what inpaint_only paints, in which it goes over into the original


@dataclass(frozen=True, eq=False)
class Map:
    """A picture of a pass's size, and for the modules of inpainting what of it is to be painted, (height, width)."""

    pixels: Pixels
    mask: NDArray[np.bool_] | None = None

    @property
    def values(self) -> NDArray[np.float32]:
        """As a ControlNet reads it: (3, height, width) in 0..1, and -1 where it is to be painted."""
        values = self.pixels.astype(np.float32) / 255
        if self.mask is not None:
            values[self.mask] = -1
        return np.asarray(values.transpose(2, 0, 1), dtype=np.float32)

    @property
    def shown(self) -> Pixels:
        """As a picture of the result: without what is to be painted."""
        if self.mask is None:
            return self.pixels
        return np.where(self.mask[..., None], np.uint8(0), self.pixels)


@dataclass(frozen=True, eq=False)
class Hint:
    """What a unit looks at in each pass, None where it has no say; and the same at the finished picture's size."""

    module: str
    first: Map | None
    second: Map | None
    final: Map
    shown: Pixels


def prepared(request: Generation) -> Canvas:
    """The canvas of a request, with the hints of its units.

    Raises:
        Damaged: a picture cannot be read. JobError: one is too narrow to be scaled.
    """
    canvas = canvases.prepared(request)
    hints = [_hint(index, unit, request, canvas) for index, unit in enumerate(request.controlnet)]
    for hint in hints:
        if hint.module == INPAINT_ONLY:
            canvas = replace(canvas, overlays=[_kept(hint.final)])
    return replace(canvas, hints=hints)


def _hint(index: int, unit: Unit, request: Generation, canvas: Canvas) -> Hint:
    """The hint of a unit. White in a mask is to be painted; for other modules than those of inpainting, a mask is what
    they look at."""
    image, mask, mode = _looked_at(index, unit, request)
    if canvas.box is not None:
        image = _cropped(image, request, canvas, mode)
        mask = _cropped(mask, request, canvas, mode) if mask is not None else None
    module = unit.module
    if mask is not None and module not in INPAINT:
        image, mask, module = mask.convert("RGB"), None, "none"
    pixels = np.asarray(image.convert("RGB"))
    resolution = unit.processor_res or _own_resolution(pixels, mode, request)
    # A subseed that nothing is varied by may be a number of this job alone.
    seed = request.seed + (request.subseed if request.subseed_strength else request.seed)
    detected = preprocessors.prepared(module, pixels, resolution, unit.threshold_a, unit.threshold_b, seed & 0xFFFFFFFF)
    if module in INPAINT:
        painted = np.zeros(pixels.shape[:2], np.uint8) if mask is None else np.asarray(mask.resize(image.size))
        detected = np.dstack([detected, painted])
    second = request.second_pass if isinstance(request, Txt2Img) else None
    first = _fitted(detected, mode, request.width, request.height)
    later = _fitted(detected, mode, second.width, second.height) if second else None
    return Hint(
        "inpaint" if canvas.mask is not None and module in INPAINT else module,
        first if unit.hr_option != HIGH_RES or second is None else None,
        later if unit.hr_option != LOW_RES else None,
        later or first,
        first.shown,
    )


def _looked_at(index: int, unit: Unit, request: Generation) -> tuple[Image.Image, Image.Image | None, str]:
    """A unit's own picture and mask, or img2img's, and how they are brought to the job's size."""
    mask = pictures.decode(unit.mask, f"controlnet unit {index}: mask").convert("L") if unit.mask else None
    if mask is not None and mask.getextrema() in {(0, 0), (255, 255)}:
        mask = None  # the extension's way to send none
    if not isinstance(request, Img2Img):
        assert unit.image is not None
        return pictures.decode(unit.image, f"controlnet unit {index}: image"), mask, unit.resize_mode
    theirs = pictures.decode(request.init_images[0], "init_images[0]")
    image = pictures.decode(unit.image, f"controlnet unit {index}: image") if unit.image else theirs
    uses_mask = unit.module in INPAINT and mask is None and request.mask is not None and image.size == theirs.size
    if uses_mask:
        mask = canvases.mask_of(request, theirs.size)
    return image, mask, _RESIZE_MODES[request.resize_mode] if uses_mask or not unit.image else unit.resize_mode


def _cropped(image: Image.Image, request: Generation, canvas: Canvas, mode: str) -> Image.Image:
    """The part of it that is painted, where that is only a part."""
    assert canvas.overlays is not None
    number = next(number for number, name in _RESIZE_MODES.items() if name == mode)
    whole = canvases.resized(image, number, *canvas.overlays[0].size)
    return canvases.resized(whole.crop(canvas.box), RESIZE_AND_FILL, request.width, request.height)


def _kept(final: Map) -> Image.Image:
    """What inpaint_only keeps of the original, for the finished picture to be laid under."""
    assert final.mask is not None
    grown: Any = cv2.dilate(final.mask.astype(np.float32), np.ones((_SOFT_EDGE, _SOFT_EDGE), np.uint8))
    stays = 255 * (1 - np.asarray(cv2.blur(grown, (_SOFT_EDGE, _SOFT_EDGE))))
    return Image.fromarray(np.dstack([final.pixels, stays.round().astype(np.uint8)]), "RGBA")


def _own_resolution(pixels: Pixels, mode: str, request: Generation) -> int:
    """The shorter side at which the picture has as many pixels as the job ("pixel perfect")."""
    height, width = pixels.shape[:2]
    factors = request.height / height, request.width / width
    side: float = (min(factors) if mode == FILLED else max(factors)) * min(height, width)
    return round(side)


def _fitted(detected: Pixels, mode: str, width: int, height: int) -> Map:
    """At that size: stretched, cut to its proportions, or with the colour of its border around it."""
    if mode == STRETCHED:
        return _map(_resized(detected, width, height))
    own_height, own_width = detected.shape[:2]
    factors = height / own_height, width / own_width
    factor = max(factors) if mode == CROPPED else min(factors)
    size = canvases.bounded(max(1, round(own_width * factor)), max(1, round(own_height * factor)))
    inner = _resized(detected, *size)
    if mode == CROPPED:
        top, left = max(0, (inner.shape[0] - height) // 2), max(0, (inner.shape[1] - width) // 2)
        return _map(inner[top : top + height, left : left + width])
    borders = np.concatenate([detected[0], detected[-1], detected[:, 0], detected[:, -1]])
    colour = np.median(borders, axis=0)
    colour[3:] = 255  # what is not there is to be painted
    whole = np.tile(colour.astype(np.uint8), (height, width, 1))
    top, left = max(0, (height - inner.shape[0]) // 2), max(0, (width - inner.shape[1]) // 2)
    whole[top : top + inner.shape[0], left : left + inner.shape[1]] = inner[:height, :width]
    return _map(whole)


def _resized(detected: Pixels, width: int, height: int) -> Pixels:
    """Maps of few colours keep them, lines stay black and white."""
    own_height, own_width = detected.shape[:2]
    if (own_width, own_height) == (width, height):
        return detected
    colours = np.unique(detected[..., :3].reshape(-1, 3), axis=0)
    if 2 < len(colours) < _FEW_COLOURS:
        interpolation = cv2.INTER_NEAREST
    else:
        interpolation = cv2.INTER_AREA if width * height < own_width * own_height else cv2.INTER_CUBIC
    result: Any = cv2.resize(detected, (width, height), interpolation=interpolation)
    if len(colours) == 2 and colours.min() < 16 and colours.max() > 240:
        grey = result[..., :3].mean(axis=2).astype(np.uint8)
        lines: Any = cv2.threshold(grey, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)[1]
        result[..., :3] = lines[..., None]
    return np.asarray(result, dtype=np.uint8)


def _map(detected: Pixels) -> Map:
    if detected.shape[2] == 3:
        return Map(detected)
    return Map(np.ascontiguousarray(detected[..., :3]), detected[..., 3] > _MASKED)
