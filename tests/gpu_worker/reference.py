"""Owns the independent source of the tests: diffusers' pipeline, loaded in its own way, with samplers as the notes on
A1111 have them."""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from gpu_worker import tiny
from services.common.payloads import Generation

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
LINSPACE = {"timestep_spacing": "linspace"}
LEADING = {"timestep_spacing": "leading"}
SDE = {"algorithm_type": "sde-dpmsolver++"}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Euler": ("EulerDiscrete", LINSPACE),
    "Euler a": ("EulerAncestralDiscrete", LINSPACE),
    "LMS": ("LMSDiscrete", LINSPACE),
    "Heun": ("HeunDiscrete", LINSPACE),
    "DPM2": ("KDPM2Discrete", LINSPACE),
    "DPM2 a": ("KDPM2AncestralDiscrete", LINSPACE),
    "DPM++ 2S a": ("DPMSolverSinglestep", {"solver_order": 2, "lower_order_final": True}),
    "DPM++ 2M": ("DPMSolverMultistep", LINSPACE),
    "DPM++ SDE": ("DPMSolverSDE", LINSPACE),
    "DPM++ 2M SDE": ("DPMSolverMultistep", SDE),
    "DPM++ 2M SDE Heun": ("DPMSolverMultistep", SDE | {"solver_type": "heun"}),
    "DPM++ 3M SDE": ("DPMSolverMultistep", SDE | {"solver_order": 3}),
    "DPM fast": ("DPMSolverSinglestep", {"solver_order": 3, "lower_order_final": True}),
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


def scheduler_of(name: str, seed: int | list[int]) -> Any:
    """A fresh scheduler for a sampler's name."""
    ending = next((ending for ending in SCHEDULES if name.endswith(ending)), "")
    kind, options = SCHEDULERS[name.removesuffix(ending)]
    options = BETAS | options | SCHEDULES.get(ending, {})
    if kind == "DPMSolverSDE":
        options["noise_sampler_seed"] = seed
    if kind == "DPMSolverSinglestep":
        del options["steps_offset"]
    return getattr(diffusers, f"{kind}Scheduler")(**options)


def pipeline_of(checkpoint: Path, tokenizer: Any, folder: Path) -> Any:
    """diffusers' own way with the tiny checkpoint: from_single_file with a local config, models included."""
    config = tiny.config()
    for part, name in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL")):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(config[part] | {"_class_name": name}))
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    index |= {"vae": ["diffusers", "AutoencoderKL"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    text_encoder = CLIPTextModel(CLIPTextConfig(**config["text_encoder"])).eval()
    prefix = "cond_stage_model.transformer.text_model."
    state = load_file(checkpoint)
    text_encoder.load_state_dict({key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)})
    options = {"config": str(folder), "local_files_only": True, "torch_dtype": torch.float32}
    made = StableDiffusionPipeline(
        vae=AutoencoderKL.from_single_file(str(checkpoint), subfolder="vae", **options),
        unet=UNet2DConditionModel.from_single_file(str(checkpoint), subfolder="unet", **options),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=EulerDiscreteScheduler(**BETAS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
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
        eta=request.eta,
        output_type="latent",
    ).images
    return found
