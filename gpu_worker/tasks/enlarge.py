"""Pictures made larger by models, without a checkpoint: extra-single-image and extra-batch-images."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gpu_worker.engine.denoise import Task
from gpu_worker.models.upscaling import Upscaler, upscaled
from gpu_worker.pictures.canvas import Canvas
from services.common.payloads.extras import Upscale


def generate(
    request: Upscale, canvas: Canvas, upscalers: Mapping[str, Upscaler], on_step: Callable[[int], None]
) -> Task[list[NDArray[np.uint8]]]:
    """Returns pixels of shape (height, width, 3), for each of the request's upscalers all pictures. `on_step` hears how
    many of them are done.

    Raises:
        JobError: a model makes too many pixels on the way, or no numbers.
    """
    results = []
    for field, _ in request.upscalers:
        for picture in canvas.pictures:
            image = Image.fromarray(picture)
            larger = yield from upscaled(upscalers[field], image, request.size_of(*image.size))
            results.append(np.asarray(larger))
            on_step(len(results))
    return results
