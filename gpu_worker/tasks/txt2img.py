"""txt2img: text → latents → denoising → pixels, as a task that the engine advances between other jobs' work."""

from __future__ import annotations

from collections.abc import Callable, Generator

import numpy as np
import torch
from numpy.typing import NDArray

from gpu_worker import noise, samplers
from gpu_worker.adapters import Adapters
from gpu_worker.denoise import Evaluation, Guidance, Task, denoise
from gpu_worker.tasks.stages import guidance, no_context, pixels_of
from gpu_worker.weights import Models
from payloads import Generation, Txt2Img


def generate(
    request: Txt2Img, models: Models, adapters: Adapters, on_step: Callable[[int], None]
) -> Task[list[NDArray[np.uint8]]]:
    """Returns pixels of shape (height, width, 3) for each image. `on_step` hears how many of steps x images are done.

    Each image has noise of its own seed. Batches of a job follow each other, and each
    picture is decoded by itself: the decoder needs far more memory than a step.

    Raises:
        JobError: a prompt is too long, or the latents became NaN.
    """
    steering = guidance(models, request, adapters)
    images = []
    for batch in range(request.n_iter):
        latents = yield from denoised(request, models, steering, batch, on_step)
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
    on_evaluation = counted(request, batch, len(sampling.timesteps), on_step)
    context = no_context(models, request)
    return (yield from denoise(sampling, latents, steering, on_evaluation, None, context))


def counted(
    request: Generation, batch: int, num_evaluations: int, on_step: Callable[[int], None]
) -> Callable[[int], None]:
    """Tells steps x images of the whole job by the evaluations of a batch; some samplers need two for a step."""

    def on_evaluation(num_done: int) -> None:
        num_steps = num_done * request.num_steps // num_evaluations
        on_step((batch * request.num_steps + num_steps) * request.batch_size)

    return on_evaluation
