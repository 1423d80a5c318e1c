"""What each step of a pass is made with: whose UNet, which texts, what ControlNets say, what is corrected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch

from gpu_worker.devices import on_device
from gpu_worker.engine.denoise import Conditioning, Correction, Guidance, Step
from gpu_worker.models import controlnet, prompt
from gpu_worker.models.adapters import Equipped
from gpu_worker.models.controlnet import Control
from gpu_worker.models.weights import Models
from gpu_worker.pictures.canvas import Canvas
from gpu_worker.pictures.hints import Hint, Map
from gpu_worker.tasks.stages import as_tensor, context_of, latents_of
from services.common.payloads import Generation, prompts
from services.common.payloads.controlnet import INPAINT_ONLY, Unit
from services.common.payloads.txt2img import SecondPass

# Aesthetic scores of what SDXL's refiner is led to, and led away from (A1111's sdxl_refiner_*_aesthetic_score).
_SCORES = (6.0, 2.5)
_COLORFIX = "tile_colorfix"


@dataclass(frozen=True, eq=False)
class Crew:
    """Who paints a pass: a checkpoint, and when there is a refiner, that one from its first step on."""

    base: Equipped
    refiner: Equipped | None = None

    @property
    def last(self) -> Models:
        """The models that the pass ends with."""
        return (self.refiner or self.base).models


def steps_of(request: Generation, crew: Crew, canvas: Canvas) -> list[Step]:
    """What each step of a pass is made with.

    Raises:
        JobError: a prompt is too long.
    """
    if crew.refiner is None:
        return _steps(request, crew.base, canvas, range(request.num_steps))
    first = request.first_refined_step
    base = _steps(request, crew.base, canvas, range(first))
    return base + _steps(request, crew.refiner, canvas, range(first, request.num_steps))


def _steps(request: Generation, equipped: Equipped, canvas: Canvas, numbers: range) -> list[Step]:
    """Steps of one checkpoint."""
    if not numbers:
        return []
    models = equipped.models
    guidance = _guidance(request, equipped)
    context = context_of(request, canvas, models)
    controls = _controls(request, equipped, canvas)
    corrections = _corrections(request, models, canvas)

    def acting(step: int) -> tuple[Control, ...]:
        found = [control for unit, control in controls if unit.acts_in(step, request.num_steps)]
        return tuple(sorted(found, key=lambda control: id(control.net)))

    return [
        Step(models.unet, guidance(step), context, acting(step), models.tiling, corrections, request.s_min_uncond)
        for step in numbers
    ]


def _guidance(request: Generation, equipped: Equipped) -> Callable[[int], Guidance]:
    """What steers a step; those of the same texts share it."""
    networks = tuple((network, use.unet_scale) for network, use in equipped.adapters.networks)

    @cache
    def encoded(text: str, is_negative: bool) -> Conditioning:
        return _encode(equipped, text, request, is_negative, is_none=is_negative and has_no_negative)

    @cache
    def steering(texts: tuple[tuple[str, float], ...], negative: str) -> Guidance:
        positives = tuple((encoded(text, False), weight) for text, weight in texts)
        return Guidance(positives, encoded(negative, True) if request.is_guided else None, request.cfg_scale, networks)

    before = request.steps_before if isinstance(request, SecondPass) else 0

    def at(text: str, step: int) -> str:
        return prompts.at_step(text, step, request.prompt_steps, before)

    # As in A1111, a negative prompt that is empty only in some steps is a text there too.
    has_no_negative = not any(at(request.negative_text, step) for step in range(request.prompt_steps + 1))

    def at_step(step: int) -> Guidance:
        texts = tuple((at(text, step), weight) for text, weight in request.texts)
        return steering(texts, at(request.negative_text, step))

    return at_step


def _encode(equipped: Equipped, text: str, request: Generation, is_negative: bool, is_none: bool) -> Conditioning:
    """What the UNet is told of a text; SDXL also of the picture's size, its refiner of a score for beauty."""
    models = equipped.models
    hidden, pooled = prompt.encode(models, text, request.clip_skip, equipped.adapters)
    if pooled is None:
        return Conditioning(hidden, None)
    if is_none:  # SDXL was trained with nothing in the place of no text
        hidden, pooled = torch.zeros_like(hidden), torch.zeros_like(pooled)
    wanted = [_SCORES[is_negative]] if models.is_refiner else [request.height, request.width]
    sizes = [request.height, request.width, 0, 0, *wanted]
    time_ids = on_device(torch.tensor([sizes], dtype=models.dtype), models.device)
    return Conditioning(hidden, {"text_embeds": pooled, "time_ids": time_ids})


def _controls(request: Generation, equipped: Equipped, canvas: Canvas) -> list[tuple[Unit, Control]]:
    """The units that have a say in this pass, with what they say. A checkpoint of another family than the ControlNets
    has none of them."""
    models, found = equipped.models, []
    for unit, net, hint in zip(request.controlnet, equipped.adapters.controlnets, canvas.hints, strict=False):
        looked_at = _in_pass(request, hint)
        if looked_at is not None:
            # Lines are too hard for a second pass, as in the extension.
            is_soft = isinstance(request, SecondPass) and unit.module == "canny"
            values = on_device(torch.from_numpy(looked_at.values)[None].to(models.dtype), models.device)
            found.append((unit, controlnet.control(net, values, unit.weight, unit.control_mode, is_soft)))
    return found


def _corrections(request: Generation, models: Models, canvas: Canvas) -> tuple[Correction, ...]:
    """What modules of ControlNet change."""
    found: list[Correction] = []
    for unit, hint in zip(request.controlnet, canvas.hints, strict=True):
        looked_at = _in_pass(request, hint)
        if looked_at is None or hint.module not in {INPAINT_ONLY, _COLORFIX}:
            continue
        original = latents_of(models, as_tensor(looked_at.pixels))
        if hint.module == INPAINT_ONLY:
            change = partial(put_back, original=original, painted=_painted(looked_at, original))
        else:
            reach = int(unit.threshold_a) * (2 if isinstance(request, SecondPass) else 1)
            change = partial(_recoloured, original=original, reach=reach)
        found.append(partial(_changed, change, min(unit.weight, 1.0)))
    return tuple(found)


def _in_pass(request: Generation, hint: Hint) -> Map | None:
    return hint.second if isinstance(request, SecondPass) else hint.first


def _changed(change: Correction, share: float, clean: torch.Tensor) -> torch.Tensor:
    """Clean latents that are changed, to a share."""
    return clean.lerp(change(clean), share)


def put_back(clean: torch.Tensor, original: torch.Tensor, painted: torch.Tensor) -> torch.Tensor:
    """The original where nothing is painted."""
    return clean * painted + original * (1 - painted)


def _painted(looked_at: Map, like: torch.Tensor) -> torch.Tensor:
    """The mask at the size of latents, with one pixel around it."""
    assert looked_at.mask is not None
    mask = on_device(torch.from_numpy(looked_at.mask)[None, None].to(like.dtype), like.device)
    return torch.nn.functional.max_pool2d(mask, 10, stride=8, padding=1)


def _recoloured(clean: torch.Tensor, original: torch.Tensor, reach: int) -> torch.Tensor:
    """The original's colours, blurred as far as that, under the details."""
    return clean - _blurred(clean, reach) + _blurred(original, reach)


def _blurred(latents: torch.Tensor, reach: int) -> torch.Tensor:
    padded = torch.nn.functional.pad(latents, (reach,) * 4, mode="replicate")
    return torch.nn.functional.avg_pool2d(padded, 2 * reach + 1, stride=1)
