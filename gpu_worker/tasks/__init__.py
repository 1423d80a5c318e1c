"""What jobs do with the engine: one generator for each kind of request."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from gpu_worker.adapters import Adapter, gathered
from gpu_worker.cache import CachedModel
from gpu_worker.canvas import Canvas
from gpu_worker.denoise import Task
from gpu_worker.tasks import img2img, txt2img
from gpu_worker.weights import Models
from services.common.payloads import Generation, Img2Img, Txt2Img


def begin(
    request: Generation,
    canvas: Canvas | None,
    models: Models,
    loaded: Mapping[CachedModel, Adapter],
    on_step: Callable[[int], None],
) -> Task[list[NDArray[np.uint8]]]:
    """The task of a request, which returns pixels of shape (height, width, 3) for each image."""
    if isinstance(request, Img2Img):
        assert canvas is not None
        return img2img.generate(request, canvas, models, gathered(request, loaded), on_step)
    assert isinstance(request, Txt2Img)
    second = gathered(request.second_pass, loaded) if request.second_pass else None
    return txt2img.generate(request, models, gathered(request, loaded), on_step, second)
