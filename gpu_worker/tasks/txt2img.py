"""txt2img: text → latents → denoising steps → pixels, as a generator that the engine advances step by step."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gpu_worker import samplers
from gpu_worker.job import JobError, Txt2Img
from gpu_worker.weights import Models

_LATENT_SCALE = 8  # pixels per latent, both ways
NAN = "the model produced NaN (not a number) instead of a picture; its weights may be damaged or overflow in fp16"


@dataclass(frozen=True)
class _Conditioning:
    """What the UNet is told: the text of shape (rows, tokens, width), and for SDXL the pooled text and sizes."""

    text: torch.Tensor
    added: dict[str, torch.Tensor] | None


def generate(request: Txt2Img, models: Models) -> Generator[int, None, list[NDArray[np.uint8]]]:
    """Yields after each denoising step the number of steps x images done; returns pixels of shape (height, width, 3).

    Noise is drawn on the CPU in fp32 with one generator for each image, seeded with seed + its index, so that a picture
    depends neither on the device nor on its company.

    Raises:
        JobError: the sampler is not known, or the latents became NaN.
    """
    samplers.create(request.sampler_name, request.scheduler, models.scheduler_config)  # refuses before any work
    guided = request.cfg_scale > 1
    one = _encode(models, request.prompt, request)
    other = _encode(models, request.negative_prompt, request) if guided else None
    images: list[NDArray[np.uint8]] = []
    for batch in range(request.n_iter):
        seed = request.seed + batch * request.batch_size
        denoising = _Denoising(request, models, _repeated(one, other, request.batch_size), seed)
        for step in range(request.steps):
            denoising.step(step)
            yield (batch * request.steps + step + 1) * request.batch_size
        images.extend(_decode(models, denoising.latents))
    return images


def _encode(models: Models, text: str, request: Txt2Img) -> _Conditioning:
    """Encodes a text of up to 75 tokens; what is longer is cut off."""
    hidden, pooled = [], None
    for encoder in models.text_encoders:
        tokens = encoder.tokenizer(text, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        output = encoder.model(tokens.input_ids.to(models.device), output_hidden_states=models.is_sdxl)
        # SDXL reads both encoders before their last layer, and the second one's projection.
        hidden.append(output.hidden_states[-2] if models.is_sdxl else output[0])
        pooled = output[0]
    if not models.is_sdxl:
        return _Conditioning(hidden[0], None)
    sizes = [request.height, request.width, 0, 0, request.height, request.width]
    time_ids = torch.tensor([sizes], dtype=models.dtype, device=models.device)
    assert pooled is not None  # there are two encoders
    return _Conditioning(torch.cat(hidden, dim=-1), {"text_embeds": pooled, "time_ids": time_ids})


def _repeated(one: _Conditioning, other: _Conditioning | None, num_rows: int) -> _Conditioning:
    """The rows of one UNet call: the negative ones first, where there is guidance."""
    rows = [one] if other is None else [other, one]

    def repeat(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([tensor.repeat_interleave(num_rows, dim=0) for tensor in tensors])

    added = [row.added for row in rows if row.added is not None]
    return _Conditioning(
        repeat([row.text for row in rows]),
        {key: repeat([values[key] for values in added]) for key in added[0]} if added else None,
    )


class _Denoising:
    """One batch on its way: its own scheduler object, a generator for each row, and the latents, fp32 of shape
    (rows, 4, height/8, width/8)."""

    def __init__(self, request: Txt2Img, models: Models, conditioning: _Conditioning, seed: int) -> None:
        self._models = models
        self._conditioning = conditioning
        self._cfg_scale = request.cfg_scale
        self._scheduler = samplers.create(request.sampler_name, request.scheduler, models.scheduler_config)
        self._scheduler.set_timesteps(request.steps, device=models.device)
        self._generators = [torch.Generator("cpu").manual_seed(seed + row) for row in range(request.batch_size)]
        shape = (1, 4, request.height // _LATENT_SCALE, request.width // _LATENT_SCALE)
        noise = torch.cat([torch.randn(shape, generator=generator) for generator in self._generators])
        self.latents: torch.Tensor = noise.to(models.device) * self._scheduler.init_noise_sigma

    def step(self, index: int) -> None:
        """Takes the denoising step of that index, from 0."""
        timestep = self._scheduler.timesteps[index]
        rows = self._scheduler.scale_model_input(self.latents, timestep).to(self._models.dtype)
        predicted = self._predict(rows, timestep)
        options = {"generator": self._generators, "return_dict": False}
        self.latents = self._scheduler.step(predicted, timestep, self.latents, **options)[0]

    def _predict(self, rows: torch.Tensor, timestep: Any) -> torch.Tensor:
        """The guided prediction in fp32 (classifier-free guidance, Ho & Salimans 2022, equation 6)."""
        guided = len(self._conditioning.text) > len(rows)
        output: torch.Tensor = self._models.unet(
            torch.cat([rows, rows]) if guided else rows,
            timestep,
            encoder_hidden_states=self._conditioning.text,
            added_cond_kwargs=self._conditioning.added,
            return_dict=False,
        )[0].float()
        if not guided:
            return output
        negative, positive = output.chunk(2)
        return negative + self._cfg_scale * (positive - negative)


def _decode(models: Models, latents: torch.Tensor) -> list[NDArray[np.uint8]]:
    """Pixels of each row, decoded one by one: the decoder needs far more memory than a step."""
    if not bool(torch.isfinite(latents).all()):
        raise JobError(NAN)
    pixels = []
    for row in torch.split(latents.to(models.vae.dtype), 1):
        decoded = models.vae.decode(row / models.vae.config.scaling_factor, return_dict=False)[0].float()
        if not bool(torch.isfinite(decoded).all()):
            raise JobError(NAN)
        scaled = ((decoded[0] / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        pixels.append(scaled.permute(1, 2, 0).cpu().numpy())
    return pixels
