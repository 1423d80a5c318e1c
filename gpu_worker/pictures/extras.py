"""Changes of pictures that need no GPU: upscaling by resampling, and the removal of backgrounds. Runs beside the GPU
thread; written from A1111's behaviour, not its code."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gpu_worker.files.cache import CachedModel
from gpu_worker.models import rembg
from services.common.payloads import pictures
from services.common.payloads.extras import TO_SIZE, Edit, RemoveBackground, Upscale

GRABCUT = "The background was removed by GrabCut, which knows colours and no objects; its edges are coarse."
_RESAMPLING = {"Lanczos": Image.Resampling.LANCZOS, "Nearest": Image.Resampling.NEAREST}
# GrabCut (Rother et al. 2004) takes what lies outside of this margin for background, and runs on a smaller picture.
_MARGIN = 0.03
_MAX_GRABCUT_SIDE = 1024
_ITERATIONS = 5


def decoded(request: Edit) -> list[Image.Image]:
    """The pictures of the request.

    Raises:
        Damaged: one cannot be read.
    """
    return [pictures.decode(text, name) for name, text in request.pictures]


def retouched(
    request: Edit, images: Sequence[Image.Image], files: Sequence[CachedModel], enlarged: Sequence[Image.Image] = ()
) -> list[Image.Image]:
    """The pictures, changed. A background is removed by the first file, where there is one; `enlarged` are, for each
    upscaler that is a model, all pictures.

    Raises:
        JobError: the file is no model that can be used.
    """
    if isinstance(request, RemoveBackground):
        return [cut_out(image, request.return_mask, files[0] if files else None) for image in images]
    assert isinstance(request, Upscale)
    by_field = {
        field: enlarged[index * len(images) : (index + 1) * len(images)]
        for index, (field, _) in enumerate(request.upscalers)
    }
    return [
        upscaled(image, request, {field: larger[index] for field, larger in by_field.items()})
        for index, image in enumerate(images)
    ]


def html_info(request: Edit, files: Sequence[CachedModel]) -> str:
    """What the client shows beside the picture."""
    if isinstance(request, RemoveBackground):
        return f"<p>{f'The background was removed by {html.escape(files[0].name)}.' if files else GRABCUT}</p>"
    assert isinstance(request, Upscale)
    return f"<p>Upscaler: {request.upscaler_1}</p>"


def upscaled(image: Image.Image, request: Upscale, enlarged: Mapping[str, Image.Image]) -> Image.Image:
    """The picture at the wanted size; without an upscaler as it is. `enlarged` is what models made of it, by the fields
    that name them."""
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    if request.upscaler_1 == "None":
        return image
    size = request.size_of(*image.size)

    def by(field: str, name: str) -> Image.Image:
        if field not in enlarged:
            return image.resize(size, _RESAMPLING[name])
        larger = enlarged[field].convert(image.mode)
        if image.mode == "RGBA":
            larger.putalpha(image.getchannel("A").resize(size, Image.Resampling.LANCZOS))
        return larger

    result = by("upscaler_1", request.upscaler_1)
    if request.upscaler_2 != "None" and request.extras_upscaler_2_visibility:
        second = by("upscaler_2", request.upscaler_2)
        result = Image.blend(result, second, request.extras_upscaler_2_visibility)
    if request.resize_mode == TO_SIZE and request.upscaling_crop:
        width, height = request.upscaling_resize_w, request.upscaling_resize_h
        left, top = result.width // 2 - width // 2, result.height // 2 - height // 2
        result = result.crop((left, top, left + width, top + height))
    return result


def cut_out(image: Image.Image, as_mask: bool, model: CachedModel | None = None) -> Image.Image:
    """The picture with its background transparent, or the mask: white is what stays. Without a model by GrabCut."""
    image = image.convert("RGB")
    if model is not None:
        mask = rembg.mask_of(image, model)
    else:
        mask = Image.fromarray(_foreground(image)).resize(image.size, Image.Resampling.LANCZOS)
    if as_mask:
        return mask
    image.putalpha(mask)
    return image


def _foreground(image: Image.Image) -> NDArray[np.uint8]:
    """255 where GrabCut sees the foreground, at the size it works in."""
    small = image.copy()
    small.thumbnail((_MAX_GRABCUT_SIDE, _MAX_GRABCUT_SIDE))
    left, top = (max(1, int(side * _MARGIN)) for side in small.size)
    labels = np.zeros((small.height, small.width), dtype=np.uint8)
    if min(small.width - 2 * left, small.height - 2 * top) < 1:
        return labels + np.uint8(255)  # too small to have a background
    cv2.setRNGSeed(0)  # the same picture gives the same result
    rectangle = left, top, small.width - 2 * left, small.height - 2 * top
    pixels = np.ascontiguousarray(np.asarray(small)[..., ::-1])
    background, foreground = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(pixels, labels, rectangle, background, foreground, _ITERATIONS, cv2.GC_INIT_WITH_RECT)
    is_foreground = (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)
    return np.where(is_foreground, np.uint8(255), np.uint8(0))
