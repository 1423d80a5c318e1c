"""txt2img: text → latents → denoising → pixels, as a task that the engine advances between other jobs' work."""

from __future__ import annotations

from collections.abc import Callable, Generator

import numpy as np
import torch
from numpy.typing import NDArray

from gpu_worker import noise, samplers
from gpu_worker.adapters import Adapters
from gpu_worker.denoise import Evaluation, Guidance, Task, denoise
from gpu_worker.tasks import hires
from gpu_worker.tasks.stages import counted, guidance, no_context, pixels_of
from gpu_worker.weights import Models
from services.common.payloads import Txt2Img


def generate(
    request: Txt2Img,
    models: Models,
    adapters: Adapters,
    on_step: Callable[[int], None],
    second_adapters: Adapters | None = None,
) -> Task[list[NDArray[np.uint8]]]:
    """Returns pixels of shape (height, width, 3) for each image. `on_step` hears how many of steps x images are done.

    Each image has noise of its own seed. Batches of a job follow each other, each with its second pass, and each
    picture is decoded by itself: the decoder needs far more memory than a step.

    Raises:
        JobError: a prompt is too long, or the latents became NaN.
    """
    steering = guidance(models, request, adapters)
    second = request.second_pass
    second_steering = guidance(models, second, second_adapters or adapters) if second else []
    images = []
    for batch in range(request.n_iter):
        latents = yield from denoised(request, models, steering, batch, on_step)
        if second:
            latents = yield from hires.denoised(request, second, latents, models, second_steering, batch, on_step)
        for row in torch.split(latents, 1):
            yield None
            images.append(pixels_of(models, row))
    return images


def denoised(
    request: Txt2Img,
    models: Models,
    steering: list[Guidance],
    batch: int,
    on_step: Callable[[int], None],
) -> Generator[Evaluation, torch.Tensor, torch.Tensor]:
    """The final latents of a batch, of shape (batch_size, 4, height/8, width/8)."""
    images = range(batch * request.batch_size, (batch + 1) * request.batch_size)
    generators = noise.generators([request.seed_of(image) for image in images])
    sampling = samplers.create(request.sampler_name, models.scheduler_config, request.steps, generators, request.eta)
    latents = sampling.latents(noise.first(request, images, generators)).to(models.device)
    on_evaluation = counted(request, batch, request, len(sampling.timesteps), on_step)
    context = no_context(models, request)
    return (yield from denoise(sampling, latents, steering, on_evaluation, None, context))
