"""Owns the independent source of the tests: diffusers' pipeline, loaded in its own way, with diffusers' schedulers, or
k-diffusion's formulas where those round or lack something."""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from services.common.payloads import Generation
from tests.gpu_worker import k_diffusion

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
LINSPACE = {"timestep_spacing": "linspace"}
LEADING = {"timestep_spacing": "leading"}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Euler": ("EulerDiscrete", LINSPACE),
    "LMS": ("LMSDiscrete", LINSPACE),
    "Heun": ("HeunDiscrete", LINSPACE),
    "DDIM": ("DDIM", LEADING | {"clip_sample": False, "set_alpha_to_one": False}),
    "PLMS": ("PNDM", LEADING | {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "UniPC": ("UniPCMultistep", LEADING | {"solver_order": 3}),
    "LCM": ("LCM", LEADING | {"clip_sample": False}),
}
SCHEDULES = {
    " Karras": {"use_karras_sigmas": True},
    " Exponential": {"use_exponential_sigmas": True},
    " SGM Uniform": {"timestep_spacing": "trailing"},
    " Beta": {"use_beta_sigmas": True},
}


def scheduler_of(name: str, seed: int | list[int], eta: float | None = None) -> Any:
    """A fresh scheduler for a sampler's name."""
    ending = next((ending for ending in SCHEDULES if name.endswith(ending)), "")
    sampler, options = name.removesuffix(ending), BETAS | SCHEDULES.get(ending, {})
    if (kind := k_diffusion.KINDS.get(sampler)) is not None:
        scheduler = k_diffusion.Scheduler(**LINSPACE | options)
        scheduler.kind, scheduler.seeds, scheduler.eta = kind, seed, kind.eta if eta is None else eta
        return scheduler
    scheduler_name, own = SCHEDULERS[sampler]
    return getattr(diffusers, f"{scheduler_name}Scheduler")(**BETAS | own | options)


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
