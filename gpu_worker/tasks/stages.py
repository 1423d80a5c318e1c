"""The stages that tasks have in common: pixels → latents, latents → pixels, and the count of steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from gpu_worker.devices import on_device
from gpu_worker.engine import decoding
from gpu_worker.engine.decoding import Decoded
from gpu_worker.models.tiling import circular
from gpu_worker.models.weights import Models
from gpu_worker.pictures.canvas import Canvas
from gpu_worker.sampling import samplers
from gpu_worker.sampling.noise import Generator
from gpu_worker.sampling.samplers import Sampling
from services.common.payloads import Generation


def latents_of(models: Models, pictures: torch.Tensor) -> torch.Tensor:
    """The latents, fp32, of pictures of shape (n, 3, height, width) in -1..1: the middle of what the encoder finds
    likely, so that a picture repeats."""
    with circular(models.vae, models.tiling):
        found = decoding.encode(models.vae, on_device(pictures.to(models.vae.dtype), models.device))
    latents: torch.Tensor = found.float() * models.vae.config.scaling_factor
    return latents


def pixels_of(models: Models, latents: torch.Tensor) -> NDArray[np.uint8]:
    """Pixels of shape (height, width, 3) of one row.

    Raises:
        JobError: the model made no numbers.
    """
    return decoded(models, latents).pixels()


def decoded(models: Models, latents: torch.Tensor) -> Decoded:
    """A picture, from latents of shape (1, 4, height/8, width/8), on its way from the device."""
    with circular(models.vae, models.tiling):
        return Decoded(models.vae, latents, models.fast_vae_for(latents))


def context_of(request: Generation, canvas: Canvas, models: Models) -> torch.Tensor | None:
    """What an inpainting UNet is told, of shape (batch_size, 5, height/8, width/8): the mask, and the originals with
    grey where they are to be painted. Without a mask all is painted, on grey. None for other UNets."""
    if not models.is_inpainting:
        return None
    if canvas.mask is None:
        latents = latents_of(models, torch.zeros(1, 3, request.height, request.width))
        mask = torch.ones_like(latents[:, :1])
    else:
        stays = 1 - torch.from_numpy(np.around(canvas.mask))
        latents = torch.cat([latents_of(models, as_tensor(picture) * stays) for picture in canvas.pictures])
        mask = on_device(torch.from_numpy(canvas.latent_mask), models.device)
    rows = request.batch_size
    return torch.cat([mask.expand(rows, 1, -1, -1), latents.expand(rows, -1, -1, -1)], 1)


def as_tensor(picture: NDArray[np.uint8]) -> torch.Tensor:
    """Pixels as the VAE reads them: (1, 3, height, width) in -1..1."""
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def sampling_of(request: Generation, models: Models, generators: Sequence[Generator]) -> Sampling:
    """A fresh sampler for the steps that a request makes of its schedule."""
    return samplers.create(
        request.sampler_name,
        models.scheduler_config,
        request.schedule_steps,
        generators,
        request.sampler_eta,
        request.first_step,
        request.s_noise,
    )


def counted(
    request: Generation, batch: int, of_pass: Generation, num_evaluations: int, on_step: Callable[[int], None]
) -> Callable[[int], None]:
    """Tells steps x images of the whole job by the evaluations of a batch's pass; some samplers need two for a step."""
    before = batch * request.total_steps + (request.num_steps if of_pass is not request else 0)

    def on_evaluation(num_done: int) -> None:
        on_step((before + num_done * of_pass.num_steps // num_evaluations) * request.batch_size)

    return on_evaluation
