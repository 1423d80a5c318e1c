"""txt2img: text → latents → denoising → pixels, as a task that the engine advances between other jobs' work."""

from __future__ import annotations

from collections.abc import Callable, Generator

import numpy as np
import torch
from numpy.typing import NDArray

from gpu_worker.devices import on_device
from gpu_worker.engine.denoise import Evaluation, Step, Task, denoise
from gpu_worker.models.upscaling import Upscaler
from gpu_worker.models.weights import Models
from gpu_worker.pictures.canvas import Canvas
from gpu_worker.sampling import noise
from gpu_worker.tasks import hires
from gpu_worker.tasks.stages import counted, decoded, sampling_of
from gpu_worker.tasks.steering import Crew, steps_of
from services.common.payloads import Txt2Img


def generate(
    request: Txt2Img,
    canvas: Canvas,
    crew: Crew,
    second_crew: Crew | None,
    on_step: Callable[[int], None],
    upscaler: Upscaler | None = None,
) -> Task[list[NDArray[np.uint8]]]:
    """Returns pixels of shape (height, width, 3) for each image. `on_step` hears how many of steps x images are done.
    `upscaler` makes the first pass's picture larger, where that shall be a model.

    Each image has noise of its own seed. Batches of a job follow each other, each with its second pass, and each
    picture is decoded by itself: the decoder needs far more memory than a step.

    Raises:
        JobError: a prompt is too long, or the latents became NaN.
    """
    steps = steps_of(request, crew, canvas)
    second = hires.begin(request, canvas, crew, second_crew, upscaler) if second_crew else None
    last = second.crew.last if second else crew.last
    images = []
    for batch in range(request.n_iter):
        latents = yield from denoised(request, crew.base.models, steps, batch, on_step)
        if second:
            latents = yield from hires.denoised(second, latents, batch, on_step)
        for row in torch.split(latents, 1):
            yield None
            images.append(decoded(last, row))
    yield None
    return [image.pixels() for image in images]


def denoised(
    request: Txt2Img, models: Models, steps: list[Step], batch: int, on_step: Callable[[int], None]
) -> Generator[Evaluation, torch.Tensor, torch.Tensor]:
    """The final latents of a batch, of shape (batch_size, 4, height/8, width/8)."""
    images = range(batch * request.batch_size, (batch + 1) * request.batch_size)
    generators = noise.generators(request, images)
    sampling = sampling_of(request, models, generators)
    latents = on_device(sampling.latents(noise.first(request, images, generators)), models.device)
    noise.reseed(request, images, generators)
    on_evaluation = counted(request, batch, request, len(sampling.timesteps), on_step)
    return (yield from denoise(sampling, latents, steps, on_evaluation))
