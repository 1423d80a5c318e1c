"""Owns the independent source of the tests: diffusers' pipeline, loaded in its own way, with samplers as the notes on
A1111 have them."""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from safetensors import safe_open

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
    "DPM++ 2S a": ("KDPM2AncestralDiscrete", LINSPACE),
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
    if kind == "EulerAncestralDiscrete" and ending:
        return _EulerAncestral(diffusers.EulerDiscreteScheduler(**options))
    if name.startswith("DPM++ 2S a"):
        return _DPM2SAncestral(**options)
    return getattr(diffusers, f"{kind}Scheduler")(**options)


class _EulerAncestral(diffusers.EulerAncestralDiscreteScheduler):  # type: ignore[misc]
    """diffusers' steps over the noise levels of another scheduler: its own knows two schedules."""

    def __init__(self, levels: Any) -> None:
        super().__init__(**BETAS, **LINSPACE)
        self._levels = levels

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(num_inference_steps, device)
        self._levels.set_timesteps(num_inference_steps, device)
        self.sigmas, self.timesteps = self._levels.sigmas, self._levels.timesteps


class _DPM2SAncestral(diffusers.KDPM2AncestralDiscreteScheduler):  # type: ignore[misc]
    """sample_dpmpp_2s_ancestral of k_diffusion/sampling.py with eta 1, whose levels are those of DPM2 a; of models that
    predict noise."""

    def step(
        self, model_output: Any, timestep: Any, sample: Any, generator: Any = None, return_dict: bool = True
    ) -> Any:
        second = self.sample is not None
        index = self.step_index - second
        sigma, middle, down = self.sigmas[index], self.sigmas_interpol[index], self.sigmas_down[index]
        self._step_index += 1
        t, t_next = -sigma.log(), -down.log()
        if not second:
            denoised = sample - sigma * model_output
            self.sample = sample
            if down == 0:
                return (denoised,)
            return (((-(t + (t_next - t) / 2)).exp() / sigma) * sample - (-(t_next - t) / 2).expm1() * denoised,)
        denoised, x = sample - middle * model_output, self.sample
        self.sample = None
        noise = randn_tensor(x.shape, generator=generator, dtype=x.dtype)
        return (down / sigma * x - (t - t_next).expm1() * denoised + noise * self.sigmas_up[index],)


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
