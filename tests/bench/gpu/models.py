"""Models of full size with random weights, made on the device from the worker's own configurations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from gpu_worker.files.cache import CachedModel
from gpu_worker.models import tiny, weights


@dataclass
class Parts:
    """A family's networks on a device, in evaluation mode."""

    config: dict[str, Any]
    unet: Any
    vae: Any
    text_encoders: list[Any]


def config_of(family: str, is_tiny: bool) -> dict[str, Any]:
    """`sd15` or `sdxl`."""
    if not is_tiny:
        return weights.family_config(family)
    if family == "sd15":
        return tiny.config()
    from tests.gpu_worker.tiny_sdxl import TINY  # which needs the generated code

    return {part: full | TINY[part] for part, full in weights.family_config("sdxl").items()}


def parts_of(family: str, is_tiny: bool, device: str, dtype: torch.dtype, vae_dtype: torch.dtype) -> Parts:
    """The same weights for the same device and types."""
    config = config_of(family, is_tiny)
    torch.manual_seed(0)
    with torch.device(device), _default(dtype):
        unet = UNet2DConditionModel(**config["unet"])
        encoders = [CLIPTextModel(CLIPTextConfig(**config["text_encoder"]))]
        if "text_encoder_2" in config:
            encoders.append(CLIPTextModelWithProjection(CLIPTextConfig(**config["text_encoder_2"])))
        vae = AutoencoderKL(**config["vae"])
    modules = [module.to(dtype).requires_grad_(False).eval() for module in (unet, *encoders)]
    return Parts(config, modules[0], vae.to(vae_dtype).requires_grad_(False).eval(), modules[1:])


def models_of(family: str, is_tiny: bool, device: str, precision: str) -> weights.Models:
    """As weights.load() leaves them: in the host's memory."""
    dtype = weights.dtype_of(precision, device)
    parts = parts_of(family, is_tiny, device, dtype, weights.vae_dtype(dtype, device))
    pads = ("<|endoftext|>", "!")
    encoders = tuple(
        weights.TextEncoder(weights.tokenizer(pad), model)
        for pad, model in zip(pads, parts.text_encoders, strict=False)
    )
    return weights.assembled(parts.unet, parts.vae, encoders, parts.config["scheduler"], torch.device(device), dtype)


def pipeline_of(family: str, is_tiny: bool, device: str, dtype: torch.dtype) -> Any:
    """diffusers' pipeline as its documentation shows it: everything of one type, nothing tuned."""
    parts = parts_of(family, is_tiny, device, dtype, dtype)
    scheduler = EulerDiscreteScheduler(**parts.config["scheduler"], timestep_spacing="linspace")
    given = {"vae": parts.vae, "unet": parts.unet, "scheduler": scheduler, "text_encoder": parts.text_encoders[0]}
    given["tokenizer"] = weights.tokenizer("<|endoftext|>")
    if family == "sdxl":
        made: Any = StableDiffusionXLPipeline(
            **given,
            text_encoder_2=parts.text_encoders[1],
            tokenizer_2=weights.tokenizer("!"),
            add_watermarker=False,
            force_zeros_for_empty_prompt=False,
        )
    else:
        made = StableDiffusionPipeline(
            **given, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    made.set_progress_bar_config(disable=True)
    return made


def file_of(folder: Path, name: str, num_bytes: int) -> CachedModel:
    """A file of that size that is never read: what is loaded in its place has random weights."""
    path = folder / name
    with path.open("wb") as file:
        file.truncate(num_bytes)
    return CachedModel(name, "Stable-diffusion", name, path, name)


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
