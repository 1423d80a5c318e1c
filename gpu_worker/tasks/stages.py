"""The stages that tasks have in common: text → what the UNet reads, pixels → latents, latents → pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from gpu_worker import prompt
from gpu_worker.adapters import Equipped
from gpu_worker.denoise import Conditioning, Guidance, Step
from gpu_worker.job import JobError
from gpu_worker.weights import Models
from services.common.payloads import Generation, prompts
from services.common.payloads.txt2img import SecondPass

# Aesthetic scores of what SDXL's refiner is led to, and led away from (A1111's sdxl_refiner_*_aesthetic_score).
_SCORES = (6.0, 2.5)
NAN = "the model produced NaN (not a number) instead of a picture; its weights may be damaged or overflow in fp16"


@dataclass(frozen=True, eq=False)
class Crew:
    """Who paints a pass: a checkpoint, and when there is a refiner, that one from its first step on."""

    base: Equipped
    refiner: Equipped | None = None

    @property
    def last(self) -> Models:
        """The models that the pass ends with."""
        return (self.refiner or self.base).models


def plan(crew: Crew, request: Generation, context: Callable[[Models], torch.Tensor | None]) -> list[Step]:
    """What each step of a pass is made with; `context` is what an inpainting UNet is told.

    Raises:
        JobError: a prompt is too long.
    """
    if crew.refiner is None:
        return _plan(crew.base, request, range(request.num_steps), context)
    first = request.first_refined_step
    base = _plan(crew.base, request, range(first), context)
    return base + _plan(crew.refiner, request, range(first, request.num_steps), context)


def _plan(
    equipped: Equipped, request: Generation, numbers: range, context: Callable[[Models], torch.Tensor | None]
) -> list[Step]:
    """Steps of one checkpoint; those of the same texts share their guidance."""
    if not numbers:
        return []
    models, adapters = equipped.models, equipped.adapters
    networks = tuple((network, use.unet_scale) for network, use in adapters.networks)

    @cache
    def encoded(text: str, is_negative: bool) -> Conditioning:
        return _encode(equipped, text, request, is_negative)

    @cache
    def steering(texts: tuple[tuple[str, float], ...], negative: str) -> Guidance:
        positives = tuple((encoded(text, False), weight) for text, weight in texts)
        return Guidance(positives, encoded(negative, True) if request.is_guided else None, request.cfg_scale, networks)

    before = request.steps_before if isinstance(request, SecondPass) else 0

    def at(text: str, step: int) -> str:
        return prompts.at_step(text, step, request.prompt_steps, before)

    def at_step(step: int) -> Guidance:
        texts = tuple((at(text, step), weight) for text, weight in request.texts)
        return steering(texts, at(request.negative_text, step))

    told = context(models)
    return [Step(models.unet, at_step(step), told) for step in numbers]


def _encode(equipped: Equipped, text: str, request: Generation, is_negative: bool) -> Conditioning:
    """What the UNet is told of a text; SDXL also of the picture's size, its refiner of a score for beauty."""
    models = equipped.models
    hidden, pooled = prompt.encode(models, text, request.clip_skip, equipped.adapters)
    if pooled is None:
        return Conditioning(hidden, None)
    if is_negative and not text:  # SDXL was trained with nothing in the place of no text
        hidden, pooled = torch.zeros_like(hidden), torch.zeros_like(pooled)
    wanted = [_SCORES[is_negative]] if models.is_refiner else [request.height, request.width]
    sizes = [request.height, request.width, 0, 0, *wanted]
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


def no_context(request: Generation, models: Models) -> torch.Tensor | None:
    """What an inpainting UNet is told when there is no mask: all is painted, on grey. None for other UNets."""
    if not models.is_inpainting:
        return None
    grey = latents_of(models, torch.zeros(1, 3, request.height, request.width))
    context = torch.cat([torch.ones_like(grey[:, :1]), grey], 1)
    return context.expand(request.batch_size, -1, -1, -1)


def as_tensor(picture: NDArray[np.uint8]) -> torch.Tensor:
    """Pixels as the VAE reads them: (1, 3, height, width) in -1..1."""
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def counted(
    request: Generation, batch: int, of_pass: Generation, num_evaluations: int, on_step: Callable[[int], None]
) -> Callable[[int], None]:
    """Tells steps x images of the whole job by the evaluations of a batch's pass; some samplers need two for a step."""
    before = batch * request.total_steps + (request.num_steps if of_pass is not request else 0)

    def on_evaluation(num_done: int) -> None:
        on_step((before + num_done * of_pass.num_steps // num_evaluations) * request.batch_size)

    return on_evaluation
