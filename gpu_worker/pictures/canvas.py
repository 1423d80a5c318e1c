"""What img2img paints on: the client's pictures and mask brought to the job's size, and put together again afterwards.

Pillow and NumPy only, so that it happens beside the GPU thread. Written from A1111's behaviour, not its code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from scipy.ndimage import gaussian_filter

from gpu_worker.job import JobError
from services.common.payloads import Generation, Img2Img, pictures
from services.common.payloads.img2img import CROP_AND_RESIZE, JUST_RESIZE, LATENT_UPSCALE, ORIGINAL, RESIZE_AND_FILL

if TYPE_CHECKING:
    from gpu_worker.pictures.hints import Hint

Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]

_LATENT_SCALE = 8
_MAX_SCALED_PIXELS = 2**26
_BLUR_REACH = 2.5  # deviations
# The blurs with which surroundings flow into the masked part, from far to near, and how often each is laid over.
_FLOWS = ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1))


@dataclass(frozen=True, eq=False)
class Canvas:
    """Pictures of shape (height, width, 3), one for all rows or one for each.

    There are none in txt2img.

    `mask` is the part to paint anew at the job's size, (height, width) in 0..1; `overlays` are what stays of the
    originals, and `box` is the part of the first one, and as large a part of the others, that was painted; None: all.
    """

    pictures: list[Pixels] = field(default_factory=list)
    mask: NDArray[np.float32] | None = None
    overlays: list[Image.Image] | None = None
    box: Box | None = None
    # What each ControlNet unit looks at.
    hints: list[Hint] = field(default_factory=list)

    @property
    def latent_mask(self) -> NDArray[np.float32]:
        """The mask at the size of latents, each 0 or 1."""
        assert self.mask is not None
        height, width = self.mask.shape
        image = Image.fromarray((self.mask * 255).round().astype(np.uint8))
        small = image.resize((width // _LATENT_SCALE, height // _LATENT_SCALE), Image.Resampling.BICUBIC)
        return np.around(np.asarray(small, dtype=np.float32) / 255)

    def finished(self, pixels: Pixels, row: int) -> Pixels:
        """A painted picture with what stays of the original laid over it."""
        if self.overlays is None:
            return pixels
        overlay = self.overlays[row % len(self.overlays)]
        painted = Image.fromarray(pixels)
        if self.box is not None:
            wider, higher = (own / first for own, first in zip(overlay.size, self.overlays[0].size, strict=True))
            left, right = (round(edge * wider) for edge in self.box[::2])
            top, bottom = (round(edge * higher) for edge in self.box[1::2])
            painted = resized(painted, CROP_AND_RESIZE, max(1, right - left), max(1, bottom - top))
            whole = Image.new("RGB", overlay.size)
            whole.paste(painted, (left, top))
            painted = whole
        return np.asarray(Image.alpha_composite(painted.convert("RGBA"), overlay).convert("RGB"))

    def maps(self, request: Generation) -> list[Pixels]:
        """What units looked at, of those whose payload asks to see it."""
        shown = zip(self.hints, request.controlnet, strict=True)
        return [hint.shown for hint, unit in shown if unit.save_detected_map]


def prepared(request: Generation) -> Canvas:
    """The canvas for a request, without hints.

    Raises:
        Damaged: a picture cannot be read. JobError: one is too narrow to be scaled.
    """
    if not isinstance(request, Img2Img):
        return Canvas()
    images = [_flat(pictures.decode(text, f"init_images[{i}]")) for i, text in enumerate(request.init_images)]
    size = request.width, request.height
    if request.mask is None:
        if request.resize_mode == LATENT_UPSCALE:
            return Canvas([np.asarray(_to_multiple(image)) for image in images])
        return Canvas([np.asarray(resized(image, request.resize_mode, *size)) for image in images])
    mask = mask_of(request, images[0].size)
    box = _box(mask, request) if request.inpaint_full_res else None
    if box is None:
        mask = resized(mask, request.resize_mode, *size)
        images = [resized(image, request.resize_mode, *size) for image in images]
        stays = mask.point(lambda value: 255 - min(2 * value, 255))
    else:
        stays = ImageOps.invert(mask)
    overlays = [_with_alpha(image, stays.resize(image.size)) for image in images]
    if box is not None:
        mask = resized(mask.crop(box), RESIZE_AND_FILL, *size)
        images = [resized(image.resize(stays.size).crop(box), RESIZE_AND_FILL, *size) for image in images]
    if request.inpainting_fill != ORIGINAL:  # beneath the latents of other fills too, so that nothing shines through
        images = [_filled(image, mask) for image in images]
    weights = np.asarray(mask, dtype=np.float32) / np.float32(255)
    return Canvas([np.asarray(image) for image in images], weights, overlays, box)


def resized(image: Image.Image, mode: int, width: int, height: int) -> Image.Image:
    """The image at that size: stretched, cut to its proportions, or filled up at its edges to them.

    Raises:
        JobError: their proportions are too different for that.
    """
    if mode in {JUST_RESIZE, LATENT_UPSCALE}:
        return image.resize((width, height), Image.Resampling.LANCZOS)
    wider = width * image.height > height * image.width  # than the image
    if wider == (mode == CROP_AND_RESIZE):
        size = width, max(1, image.height * width // image.width)
    else:
        size = max(1, image.width * height // image.height), height
    scaled = image.resize(bounded(*size), Image.Resampling.LANCZOS)
    left, top = width // 2 - size[0] // 2, height // 2 - size[1] // 2
    if mode == CROP_AND_RESIZE:
        return scaled.crop((-left, -top, width - left, height - top))
    rows, columns = _clamped(height, top, size[1]), _clamped(width, left, size[0])
    return Image.fromarray(np.asarray(scaled)[rows][:, columns])


def bounded(width: int, height: int) -> tuple[int, int]:
    """The size that a picture is to be scaled to. One of a few KB, but long and narrow, may take all memory.

    Raises:
        JobError: it is too large.
    """
    if width * height > _MAX_SCALED_PIXELS:
        raise JobError(
            f"a picture of the job is so long and narrow that it would be scaled to {width}x{height} pixels; "
            f"at most {_MAX_SCALED_PIXELS} pixels are possible: cut it to the job's proportions"
        )
    return width, height


def _clamped(length: int, offset: int, inner: int) -> NDArray[np.intp]:
    """For each place on an edge, the nearest one of something that lies on it at an offset."""
    return np.clip(np.arange(length) - offset, 0, inner - 1)


def _flat(image: Image.Image) -> Image.Image:
    """Without transparency: on white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")


def _to_multiple(image: Image.Image) -> Image.Image:
    """Cut to whole latents."""
    width, height = (max(side // _LATENT_SCALE, 1) * _LATENT_SCALE for side in image.size)
    return image.crop((0, 0, width, height))


def mask_of(request: Img2Img, size: tuple[int, int]) -> Image.Image:
    """The mask at the picture's size, with soft edges. A drawing on a transparent ground masks what is drawn."""
    assert request.mask is not None
    image = pictures.decode(request.mask, "mask")
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if alpha is not None and alpha.getextrema() != (255, 255):
        mask = alpha.point(lambda value: 255 if value > 128 else 0)
    else:
        mask = image.convert("L")
    if mask.size != size:
        mask = mask.resize(size, Image.Resampling.LANCZOS)
    if request.inpainting_mask_invert:
        mask = ImageOps.invert(mask)
    blur = request.mask_blur_y, request.mask_blur_x
    if not any(blur):
        return mask
    blurred: Any = gaussian_filter(np.asarray(mask, dtype=np.float32), blur, mode="mirror", truncate=_BLUR_REACH)
    return Image.fromarray(blurred.round().astype(np.uint8))


def _box(mask: Image.Image, request: Img2Img) -> Box | None:
    """The masked part with its padding, widened to the job's proportions within the picture. None: nothing is masked,
    so there is no part to choose."""
    found = mask.getbbox()
    if found is None:
        return None
    padding = request.inpaint_full_res_padding
    left, right = max(found[0] - padding, 0), min(found[2] + padding, mask.width)
    top, bottom = max(found[1] - padding, 0), min(found[3] + padding, mask.height)
    ratio = request.width / request.height
    if ratio > (right - left) / (bottom - top):
        left, right = _widened(left, right, int((bottom - top) * ratio), mask.width)
    else:
        top, bottom = _widened(top, bottom, int((right - left) / ratio), mask.height)
    return left, top, right, bottom


def _widened(low: int, high: int, wanted: int, limit: int) -> tuple[int, int]:
    """A range made longer on both sides, and moved to stay within 0..limit."""
    length = min(max(wanted, high - low), limit)
    low = min(max(low - (length - (high - low)) // 2, 0), limit - length)
    return low, low + length


def _with_alpha(image: Image.Image, alpha: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    image.putalpha(alpha)
    return image


def _filled(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The image with the colours around the mask flowing into it."""
    surroundings = _with_alpha(image, ImageOps.invert(mask)).convert("RGBa")
    filled = Image.new("RGBA", image.size)
    for radius, times in _FLOWS:
        flow = surroundings.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(times):
            filled.alpha_composite(flow)
    return filled.convert("RGB")
