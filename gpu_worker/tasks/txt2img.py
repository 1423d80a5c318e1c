"""txt2img: text → latents → denoising → pixels, as a task that the engine advances between other jobs' work."""

from __future__ import annotations

from collections.abc import Callable, Generator

import numpy as np
import torch
from numpy.typing import NDArray

from gpu_worker import noise, prompt, samplers
from gpu_worker.denoise import Conditioning, Evaluation, Task, denoise
from gpu_worker.job import JobError
from gpu_worker.weights import Models
from payloads import Generation

NAN = "the model produced NaN (not a number) instead of a picture; its weights may be damaged or overflow in fp16"


def generate(request: Generation, models: Models, on_step: Callable[[int], None]) -> Task[list[NDArray[np.uint8]]]:
    """Returns pixels of shape (height, width, 3) for each image. `on_step` hears how many of steps x images are done.

    Each image has noise of its own seed. Batches of a job follow each other, and each
    picture is decoded by itself: the decoder needs far more memory than a step.

    Raises:
        JobError: a prompt is too long, or the latents became NaN.
    """
    positive = encode(models, request.prompt, request)
    negative = encode(models, request.negative_prompt, request) if request.is_guided else None
    images = []
    for batch in range(request.n_iter):
        latents = yield from denoised(request, models, positive, negative, batch, on_step)
        for row in torch.split(latents, 1):
            yield None
            images.append(_decode(models, row))
    return images


def denoised(
    request: Generation,
    models: Models,
    positive: Conditioning,
    negative: Conditioning | None,
    batch: int,
    on_step: Callable[[int], None],
) -> Generator[Evaluation, torch.Tensor, torch.Tensor]:
    """The final latents of a batch, of shape (batch_size, 4, height/8, width/8)."""
    images = range(batch * request.batch_size, (batch + 1) * request.batch_size)
    generators = noise.generators([request.seed_of(image) for image in images])
    sampling = samplers.create(request.sampler_name, models.scheduler_config, request.steps, generators, request.eta)
    latents = sampling.latents(noise.first(request, images, generators)).to(models.device)

    def on_evaluation(num_done: int) -> None:
        # Some samplers need two evaluations for a step.
        num_steps = num_done * request.steps // len(sampling.timesteps)
        on_step((batch * request.steps + num_steps) * request.batch_size)

    return (yield from denoise(sampling, latents, positive, negative, request.cfg_scale, on_evaluation))


def encode(models: Models, text: str, request: Generation) -> Conditioning:
    """What the UNet is told of a text; SDXL also of the picture's size."""
    hidden, pooled = prompt.encode(models, text, request.clip_skip)
    if pooled is None:
        return Conditioning(hidden, None)
    sizes = [request.height, request.width, 0, 0, request.height, request.width]
    time_ids = torch.tensor([sizes], dtype=models.dtype, device=models.device)
    return Conditioning(hidden, {"text_embeds": pooled, "time_ids": time_ids})


def _decode(models: Models, latents: torch.Tensor) -> NDArray[np.uint8]:
    """Pixels of one row."""
    if not bool(torch.isfinite(latents).all()):
        raise JobError(NAN)
    latents = latents.to(models.vae.dtype) / models.vae.config.scaling_factor
    decoded = models.vae.decode(latents, return_dict=False)[0].float()
    if not bool(torch.isfinite(decoded).all()):
        raise JobError(NAN)
    scaled = ((decoded[0] / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    pixels: NDArray[np.uint8] = scaled.permute(1, 2, 0).cpu().numpy()
    return pixels
