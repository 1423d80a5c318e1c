"""The second pass of txt2img (A1111's hires fix): the first one's picture, scaled up, noised and denoised again."""

from __future__ import annotations

from collections.abc import Callable, Generator

import numpy as np
import torch
from PIL import Image

from gpu_worker import noise, samplers
from gpu_worker.denoise import LATENT_SCALE, Evaluation, Guidance, denoise
from gpu_worker.tasks.stages import as_tensor, counted, latents_of, no_context, pixels_of
from gpu_worker.weights import Models
from services.common.payloads import Txt2Img
from services.common.payloads.txt2img import LATENT_UPSCALERS, SecondPass

_RESAMPLING = {"Nearest": Image.Resampling.NEAREST}


def denoised(
    request: Txt2Img,
    second: SecondPass,
    latents: torch.Tensor,
    models: Models,
    steering: list[Guidance],
    batch: int,
    on_step: Callable[[int], None],
) -> Generator[Evaluation | None, torch.Tensor, torch.Tensor]:
    """The final latents of a batch at the second pass's size, from those of the first."""
    scaled = yield from upscaled(request, latents, models)
    images = range(batch * request.batch_size, (batch + 1) * request.batch_size)
    generators = noise.generators([request.seed_of(image) for image in images])
    first = noise.first(second, images, generators)
    sampling = samplers.create(
        second.sampler_name, models.scheduler_config, second.steps, generators, second.eta, second.first_step
    )
    on_evaluation = counted(request, batch, second, len(sampling.timesteps), on_step)
    noised = sampling.noised(scaled, first, 0).to(models.device)
    return (yield from denoise(sampling, noised, steering, on_evaluation, None, no_context(models, second)))


def upscaled(request: Txt2Img, latents: torch.Tensor, models: Models) -> Generator[None, torch.Tensor, torch.Tensor]:
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
            larger = Image.fromarray(pixels_of(models, row)).resize((width, height), resampling)
            rows.append(latents_of(models, as_tensor(np.asarray(larger))).cpu())
            yield None
        scaled = torch.cat(rows)
    return _middle(scaled, *request.hr_size)


def _middle(latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """The middle of latents, of a size in pixels."""
    rows, columns = height // LATENT_SCALE, width // LATENT_SCALE
    top, left = (latents.shape[2] - rows) // 2, (latents.shape[3] - columns) // 2
    return latents[:, :, top : top + rows, left : left + columns]
