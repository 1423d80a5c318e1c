"""The stages that tasks have in common: text → what the UNet reads, pixels → latents, latents → pixels."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from gpu_worker import prompt
from gpu_worker.denoise import Conditioning
from gpu_worker.job import JobError
from gpu_worker.weights import Models
from payloads import Generation

NAN = "the model produced NaN (not a number) instead of a picture; its weights may be damaged or overflow in fp16"


def texts(models: Models, request: Generation) -> tuple[Conditioning, Conditioning | None]:
    """The prompt and, where there is guidance, the negative prompt.

    Raises:
        JobError: a prompt is too long.
    """
    negative = encode(models, request.negative_prompt, request) if request.is_guided else None
    return encode(models, request.prompt, request), negative


def encode(models: Models, text: str, request: Generation) -> Conditioning:
    """What the UNet is told of a text; SDXL also of the picture's size."""
    hidden, pooled = prompt.encode(models, text, request.clip_skip)
    if pooled is None:
        return Conditioning(hidden, None)
    sizes = [request.height, request.width, 0, 0, request.height, request.width]
    time_ids = torch.tensor([sizes], dtype=models.dtype, device=models.device)
    return Conditioning(hidden, {"text_embeds": pooled, "time_ids": time_ids})


def latents_of(models: Models, pictures: torch.Tensor) -> torch.Tensor:
    """The latents, fp32, of pictures of shape (n, 3, height, width) in -1..1: the middle of what the encoder finds
    likely, so that a picture repeats."""
    found = models.vae.encode(pictures.to(models.device, models.vae.dtype)).latent_dist.mode()
    latents: torch.Tensor = found.float() * models.vae.config.scaling_factor
    return latents


def pixels_of(models: Models, latents: torch.Tensor) -> NDArray[np.uint8]:
    """Pixels of shape (height, width, 3) of one row.

    Raises:
        JobError: the model made no numbers.
    """
    if not bool(torch.isfinite(latents).all()):
        raise JobError(NAN)
    latents = latents.to(models.vae.dtype) / models.vae.config.scaling_factor
    decoded = models.vae.decode(latents, return_dict=False)[0].float()
    if not bool(torch.isfinite(decoded).all()):
        raise JobError(NAN)
    scaled = ((decoded[0] / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    pixels: NDArray[np.uint8] = scaled.permute(1, 2, 0).cpu().numpy()
    return pixels


def no_context(models: Models, request: Generation) -> torch.Tensor | None:
    """What an inpainting UNet is told when there is no mask: all is painted, on grey. None for other UNets."""
    if not models.is_inpainting:
        return None
    grey = latents_of(models, torch.zeros(1, 3, request.height, request.width))
    context = torch.cat([torch.ones_like(grey[:, :1]), grey], 1)
    return context.expand(request.batch_size, -1, -1, -1)
