"""img2img and inpainting: pixels → latents → some of the denoising → pixels."""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from gpu_worker.devices import on_device
from gpu_worker.engine.denoise import Evaluation, Step, Task, denoise
from gpu_worker.models.weights import Models
from gpu_worker.pictures.canvas import Canvas
from gpu_worker.sampling import noise
from gpu_worker.tasks.stages import as_tensor, counted, decoded, latents_of, sampling_of
from gpu_worker.tasks.steering import Crew, put_back, steps_of
from services.common.payloads import Img2Img
from services.common.payloads.img2img import LATENT_NOISE, LATENT_NOTHING


def generate(
    request: Img2Img, canvas: Canvas, crew: Crew, on_step: Callable[[int], None]
) -> Task[list[NDArray[np.uint8]]]:
    """Returns pixels for each image, as txt2img's does; the canvas has what stays of the originals.

    Raises:
        JobError: a prompt is too long, or the latents became NaN.
    """
    steps = steps_of(request, crew, canvas)
    yield None
    originals = encoded(request, canvas, crew.base.models)
    images = []
    for batch in range(request.n_iter):
        latents = yield from denoised(request, canvas, crew.base.models, originals, steps, batch, on_step)
        for row in torch.split(latents, 1):
            yield None
            images.append(decoded(crew.last, row))
    yield None
    return [image.pixels() for image in images]


def encoded(request: Img2Img, canvas: Canvas, models: Models) -> torch.Tensor:
    """The originals' latents of shape (batch_size, 4, height/8, width/8), on the CPU, where the noise is."""
    rows = [latents_of(models, as_tensor(picture)).cpu() for picture in canvas.pictures]
    # A picture that was not scaled to the job's size is scaled here.
    size = request.height // 8, request.width // 8
    scaled = [
        torch.nn.functional.interpolate(row, size, mode="bilinear") if row.shape[2:] != size else row for row in rows
    ]
    return torch.cat(scaled).expand(request.batch_size, -1, -1, -1)


def denoised(
    request: Img2Img,
    canvas: Canvas,
    models: Models,
    originals: torch.Tensor,
    steps: list[Step],
    batch: int,
    on_step: Callable[[int], None],
) -> Generator[Evaluation, torch.Tensor, torch.Tensor]:
    """The final latents of a batch, of shape (batch_size, 4, height/8, width/8)."""
    images = range(batch * request.batch_size, (batch + 1) * request.batch_size)
    generators = noise.generators(request, images)
    first = noise.first(request, images, generators)
    sampling = sampling_of(request, models, generators)
    noise.reseed(request, images, generators)
    mask = None if canvas.mask is None else torch.from_numpy(canvas.latent_mask)
    if mask is not None and request.inpainting_fill in {LATENT_NOISE, LATENT_NOTHING}:
        originals = originals * (1 - mask) + first * mask * (request.inpainting_fill == LATENT_NOISE)
    first = first * request.initial_noise_multiplier
    latents = on_device(sampling.noised(originals, first, 0), models.device)
    on_evaluation = counted(request, batch, request, len(sampling.timesteps), on_step)
    keep = None
    if mask is not None:
        # Of what the UNet takes the clean latents to be, as in A1111, so that what stays has the sampler's noise too.
        keep = partial(put_back, original=on_device(originals, models.device), painted=on_device(mask, models.device))
    return (yield from denoise(sampling, latents, steps, on_evaluation, keep))
