"""The second pass of txt2img (A1111's hires fix): the first one's picture, scaled up, noised and denoised again."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from gpu_worker.devices import on_device
from gpu_worker.engine.denoise import LATENT_SCALE, Evaluation, Step, denoise
from gpu_worker.job import JobError
from gpu_worker.models.upscaling import Upscaler
from gpu_worker.models.upscaling import upscaled as enlarged
from gpu_worker.models.weights import Models
from gpu_worker.pictures.canvas import Canvas
from gpu_worker.sampling import noise
from gpu_worker.tasks.stages import as_tensor, counted, latents_of, pixels_of, sampling_of
from gpu_worker.tasks.steering import Crew, steps_of
from services.common.payloads import Txt2Img
from services.common.payloads.txt2img import SecondPass
from services.common.payloads.upscalers import LATENT_UPSCALERS

_RESAMPLING = {"Nearest": Image.Resampling.NEAREST}


@dataclass(frozen=True, eq=False)
class Second:
    """The second pass of a request: who paints it, what with, and who decodes what it begins with."""

    first: Txt2Img
    request: SecondPass
    crew: Crew
    steps: list[Step]
    decoder: Models
    upscaler: Upscaler | None = None


def begin(request: Txt2Img, canvas: Canvas, first_crew: Crew, crew: Crew, upscaler: Upscaler | None = None) -> Second:
    """The second pass of a request that has one.

    Raises:
        JobError: a prompt is too long, or its checkpoint cannot read the first one's latents.
    """
    second = request.second_pass
    assert second is not None
    if request.hr_upscaler in LATENT_UPSCALERS and crew.base.models.is_sdxl != first_crew.last.is_sdxl:
        raise JobError(
            f"hr_checkpoint_name {request.hr_checkpoint_name} has latents of another family than the first pass, so "
            f"hr_upscaler {request.hr_upscaler} cannot scale them; Lanczos scales pixels"
        )
    return Second(request, second, crew, steps_of(second, crew, canvas), first_crew.last, upscaler)


def denoised(
    second: Second, latents: torch.Tensor, batch: int, on_step: Callable[[int], None]
) -> Generator[Evaluation | None, torch.Tensor, torch.Tensor]:
    """The final latents of a batch at the second pass's size, from those of the first."""
    models, first, request = second.crew.base.models, second.first, second.request
    scaled = yield from upscaled(first, latents, second.decoder, models, second.upscaler)
    if not request.num_steps:
        return on_device(scaled, models.device)
    images = range(batch * first.batch_size, (batch + 1) * first.batch_size)
    generators = noise.generators(request, images)
    drawn = noise.first(request, images, generators)
    sampling = sampling_of(request, models, generators)
    noise.reseed(request, images, generators)
    on_evaluation = counted(first, batch, request, len(sampling.timesteps), on_step)
    noised = on_device(sampling.noised(scaled, drawn, 0), models.device)
    return (yield from denoise(sampling, noised, second.steps, on_evaluation))


def upscaled(
    request: Txt2Img, latents: torch.Tensor, decoder: Models, encoder: Models, upscaler: Upscaler | None = None
) -> Generator[None, torch.Tensor, torch.Tensor]:
    """Latents of the second pass's size, on the CPU, without noise. Lets others go first between its stages.

    Raises:
        JobError: the first pass's latents became NaN.
    """
    yield None
    width, height = request.hr_full_size
    if request.hr_upscaler in LATENT_UPSCALERS:
        mode, antialias = LATENT_UPSCALERS[request.hr_upscaler]
        size = height // LATENT_SCALE, width // LATENT_SCALE
        scaled = torch.nn.functional.interpolate(latents.cpu(), size, mode=mode, antialias=antialias)
    else:
        resampling = _RESAMPLING.get(request.hr_upscaler, Image.Resampling.LANCZOS)
        rows = []
        for row in torch.split(latents, 1):
            picture = Image.fromarray(pixels_of(decoder, row))
            if upscaler is not None:
                larger = yield from enlarged(upscaler, picture, (width, height))
            else:
                larger = picture.resize((width, height), resampling)
            rows.append(latents_of(encoder, as_tensor(np.asarray(larger))).cpu())
            yield None
        scaled = torch.cat(rows)
    return _middle(scaled, *request.hr_size)


def _middle(latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """The middle of latents, of a size in pixels."""
    rows, columns = height // LATENT_SCALE, width // LATENT_SCALE
    top, left = (latents.shape[2] - rows) // 2, (latents.shape[3] - columns) // 2
    return latents[:, :, top : top + rows, left : left + columns]
