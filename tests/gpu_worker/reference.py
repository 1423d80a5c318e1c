"""Owns the independent source of the tests: diffusers' pipeline, loaded in its own way, with diffusers' schedulers, or
k-diffusion's formulas where those round or lack something; and denoising as a formula, for what no pipeline does."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from services.common.payloads import Generation, Txt2Img
from tests.gpu_worker import k_diffusion

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
LINSPACE = {"timestep_spacing": "linspace"}
LEADING = {"timestep_spacing": "leading"}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIM", LEADING | {"clip_sample": False, "set_alpha_to_one": False}),
    "PLMS": ("PNDM", LEADING | {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "UniPC": ("UniPCMultistep", LEADING | {"solver_order": 3}),
    "LCM": ("LCM", LEADING | {"clip_sample": False}),
}


def scheduler_of(name: str, seed: int | list[int], eta: float | None = None) -> Any:
    """A fresh scheduler for a sampler's name."""
    schedule = next((schedule for schedule in k_diffusion.SCHEDULES if name.endswith(f" {schedule}")), "")
    sampler = name.removesuffix(f" {schedule}")
    if (kind := k_diffusion.KINDS.get(sampler)) is not None:
        scheduler = k_diffusion.Scheduler(**BETAS | LINSPACE)
        scheduler.kind, scheduler.schedule, scheduler.seeds = kind, schedule or kind.schedule, seed
        scheduler.eta = kind.eta if eta is None else eta
        return scheduler
    scheduler_name, own = SCHEDULERS[sampler]
    return getattr(diffusers, f"{scheduler_name}Scheduler")(**BETAS | own)


def pipeline_of(checkpoint: Path, tokenizer: Any, folder: Path) -> Any:
    """diffusers' own way with a tiny checkpoint: the stock pipeline's from_single_file, told the sizes by a folder in
    diffusers' layout, which is made from the file's metadata."""
    with safe_open(checkpoint, framework="pt") as file:
        config = json.loads(file.metadata()["esd_config"])
    parts = {
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "scheduler": ("diffusers", "EulerDiscreteScheduler"),
    }
    index = {"_class_name": "StableDiffusionPipeline", **parts}
    index |= {"safety_checker": (None, None), "feature_extractor": (None, None), "image_encoder": (None, None)}
    (folder / "model_index.json").write_text(json.dumps(index))
    for part in config:
        (folder / part).mkdir()
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        kind = {"model_type": "clip_text_model"} if part == "text_encoder" else {"_class_name": parts[part][1]}
        (folder / part / name).write_text(json.dumps(config[part] | kind))
    tokenizer.save_pretrained(folder / "tokenizer")
    made = StableDiffusionPipeline.from_single_file(
        str(checkpoint), config=str(folder), local_files_only=True, torch_dtype=torch.float32
    )
    made.set_progress_bar_config(disable=True)
    return made


def pipeline_latents(pipeline: Any, sampler: str, request: Generation, **options: Any) -> torch.Tensor:
    """The final latents of the request's first batch, made by the pipeline alone."""
    seeds = [request.seed + row for row in range(request.batch_size)]
    pipeline.scheduler = scheduler_of(sampler, seeds)
    # No negative prompt is the text "" in SD1.5 and nothing in SDXL.
    negative = [request.negative_prompt] * len(seeds) if request.negative_prompt else None
    texts = {"prompt": [request.prompt] * len(seeds), "negative_prompt": negative}
    found: torch.Tensor = pipeline(
        **(options or texts),
        num_inference_steps=request.steps,
        guidance_scale=request.cfg_scale,
        width=request.width,
        height=request.height,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        eta=request.eta or 0.0,
        output_type="latent",
    ).images
    return found


# What the UNet reads of a text and, of SDXL, the text as a whole.
Text = tuple[torch.Tensor, torch.Tensor | None]


@dataclass
class Told:
    """What an evaluation is made with: the UNet, texts with weights, and the text to lead away from. `wanted` are the
    numbers after the picture's size and place, of a text and of the negative one, that SDXL is told."""

    unet: Any
    positives: list[tuple[Text, float]]
    negative: Text | None
    wanted: tuple[list[int], list[int]] | tuple[list[float], list[float]] = ([64, 64], [64, 64])


@torch.inference_mode()
def by_formula(request: Txt2Img, told: Callable[[int], Told], scheduler: Any = None) -> torch.Tensor:
    """The final latents of a picture of 64x64, every text in a UNet call of its own. `told` answers for an evaluation's
    number. The scheduler is that of the sampler's name, or another in its place."""
    scheduler = scheduler or scheduler_of(request.sampler_name, [request.seed])
    scheduler.set_timesteps(request.steps)
    generator = torch.Generator().manual_seed(request.seed)
    x = torch.randn(1, 4, 8, 8, generator=generator) * scheduler.init_noise_sigma
    for index, time in enumerate(scheduler.timesteps):
        now, scaled = told(index), scheduler.scale_model_input(x, time)

        def output(text: Text, wanted: list[Any], now: Told = now, scaled: Any = scaled, time: Any = time) -> Any:
            hidden, whole = text
            time_ids = torch.tensor([[64, 64, 0, 0, *wanted]])
            added = None if whole is None else {"text_embeds": whole, "time_ids": time_ids}
            return now.unet(scaled, time, hidden, added_cond_kwargs=added, return_dict=False)[0]

        outputs = [(output(text, now.wanted[0]), weight) for text, weight in now.positives]
        if now.negative is None:
            ((prediction, _),) = outputs
        else:
            away = output(now.negative, now.wanted[1])
            prediction = away + sum(request.cfg_scale * weight * (found - away) for found, weight in outputs)
        x = scheduler.step(prediction, time, x, generator=generator, return_dict=False)[0]
    return x
