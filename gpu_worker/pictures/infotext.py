"""The text that A1111 writes into a picture, and reads back from one that is dropped on it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from gpu_worker import VERSION
from gpu_worker.files.cache import CachedModel
from services.common.payloads import Generation, Img2Img, Txt2Img
from services.common.payloads.img2img import FILL, LATENT_NOISE, LATENT_NOTHING
from services.common.payloads.models import (
    BASE,
    CONTROLNET,
    EMBEDDING,
    HYPERNETWORK,
    LORA,
    REMBG,
    UPSCALER,
    VAE,
    find,
    stem,
)
from services.common.payloads.plots import NOTHING, Plot
from services.common.payloads.samplers import parts, sampler_of

_MASKED_CONTENT = {FILL: "fill", LATENT_NOISE: "latent noise", LATENT_NOTHING: "latent nothing"}


def named(files: list[CachedModel], kind: str) -> CachedModel | None:
    """The model of that type, where a job has one at most."""
    return next((file for file in files if file.type == kind), None)


def hashes(files: list[CachedModel]) -> dict[str, str]:
    """The SHA-256 of every model behind a picture, by the names that A1111 has for them. Further checkpoints have none
    there and are `model:<name>`."""
    names = {
        BASE: "model:{}",
        VAE: "vae",
        LORA: "lora:{}",
        HYPERNETWORK: "hypernet:{}",
        EMBEDDING: "embed:{}",
        CONTROLNET: "controlnet:{}",
    }
    names |= {UPSCALER: "upscaler:{}", REMBG: "rembg:{}"}
    found = {names[file.type].format(stem(file.name)): file.sha256 for file in files}
    base = named(files, BASE)
    return {"model": found.pop(f"model:{stem(base.name)}")} | found if base else found


@dataclass(frozen=True)
class Made:
    """The making of a picture: image `index` of a request, with these files; of a grid, that of its first picture."""

    request: Generation
    index: int
    files: list[CachedModel]
    plot: Plot | None = None


def infotext(made: Made) -> str:
    """The text in a picture; in a grid, with what the plot is of."""
    request, index, files = made.request, made.index, made.files
    base, vae = named(files, BASE), named(files, VAE)
    assert base is not None
    resized_from = f"{request.seed_resize_from_w}x{request.seed_resize_from_h}"
    fields: dict[str, Any] = {
        "Steps": request.steps,
        "Sampler": request.sampler_name,
        "Schedule type": _schedule(request.sampler_name),
        "CFG scale": request.cfg_scale,
        "Seed": request.seed_of(index),
        "Size": f"{request.width}x{request.height}",
        "Model hash": base.sha256[:10],
        "Model": stem(base.name),
        "VAE hash": vae.sha256[:10] if vae else None,
        "VAE": vae.name if vae else None,
        "Variation seed": request.subseed_of(index) if request.subseed_strength else None,
        "Variation seed strength": request.subseed_strength or None,
        "Seed resize from": resized_from if request.seed_resize_from_w > 0 < request.seed_resize_from_h else None,
        "Denoising strength": denoising_strength(request),
        "Clip skip": request.clip_skip if request.clip_skip > 1 else None,
        "ENSD": request.noise_seed_delta or None,
        "RNG": request.noise_source if request.noise_source != "GPU" else None,  # which A1111 takes it for then
        "NGMS": request.s_min_uncond or None,
        "Sigma noise": request.s_noise if request.s_noise != 1 else None,
        "Tiling": True if request.tiling else None,
        **_eta_fields(request),
        **_img2img_fields(request),
        **_second_pass_fields(request),
        **_refiner_fields(request, files),
        **_controlnet_fields(request, files),
        **_plot_fields(made.plot),
    }
    lines = [request.prompt]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    said = [f"{key}: {_quoted(value)}" for key, value in fields.items() if value is not None]
    lines.append(", ".join([*said, f"Hashes: {json.dumps(hashes(files))}", f"Version: esd {VERSION}"]))
    return "\n".join(lines)


def denoising_strength(request: Generation) -> float | None:
    """That of a request which paints on a picture, its own from a first pass included."""
    if isinstance(request, Img2Img) or (isinstance(request, Txt2Img) and request.enable_hr):
        return request.denoising_strength
    return None


def _quoted(value: Any) -> str:
    """In quotes where A1111 would take it for several fields."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(letter in text for letter in ",:\n") else text


def _schedule(sampler_name: str) -> str | None:
    """The schedule, of a sampler that has a choice. Newer versions do not take it from a bare name."""
    return parts(sampler_name)[1] if sampler_of(sampler_name).has_choice else None


def _eta_fields(request: Generation) -> dict[str, Any]:
    """That of each pass's sampler, where it is another than A1111's default."""
    second = request.second_pass if isinstance(request, Txt2Img) else None
    etas = [(each.sampler_name, each.sampler_eta) for each in (request, second) if each is not None]
    changed = {name: eta for name, eta in etas if sampler_of(name).eta not in (None, eta)}
    return {"Eta DDIM" if name == "DDIM" else "Eta": eta for name, eta in changed.items()}


def _img2img_fields(request: Generation) -> dict[str, Any]:
    if not isinstance(request, Img2Img):
        return {}
    fields: dict[str, Any] = {}
    if request.initial_noise_multiplier != 1:
        fields["Noise multiplier"] = request.initial_noise_multiplier
    if request.mask is not None:
        if request.inpainting_mask_invert:
            fields["Mask mode"] = "Inpaint not masked"
        if request.inpainting_fill in _MASKED_CONTENT:
            fields["Masked content"] = _MASKED_CONTENT[request.inpainting_fill]
        blur = request.mask_blur_x, request.mask_blur_y
        fields["Mask blur"] = blur[0] if blur[0] == blur[1] else f"{blur[0]}x{blur[1]}"
        if request.inpaint_full_res:
            fields |= {"Inpaint area": "Only masked", "Masked area padding": request.inpaint_full_res_padding}
    return fields


def _second_pass_fields(request: Generation) -> dict[str, Any]:
    if not isinstance(request, Txt2Img) or not request.enable_hr:
        return {}
    is_resized = request.hr_resize_x or request.hr_resize_y
    fields: dict[str, Any] = {
        "Hires upscale": None if is_resized else request.hr_scale,
        "Hires resize": f"{request.hr_resize_x}x{request.hr_resize_y}" if is_resized else None,
        "Hires steps": request.hr_second_pass_steps or None,
        "Hires upscaler": request.hr_upscaler,
        "Hires sampler": request.hr_sampler_name or None,
        "Hires schedule type": _schedule(request.hr_sampler_name) if request.hr_sampler_name else None,
        "Hires prompt": request.hr_prompt or None,
        "Hires negative prompt": request.hr_negative_prompt or None,
    }
    return fields


def _refiner_fields(request: Generation, files: list[CachedModel]) -> dict[str, Any]:
    bases = [file for file in files if file.type == BASE]
    named = [(BASE, file.name) for file in bases]
    fields: dict[str, Any] = {}
    for field, name in request.other_checkpoints:
        file = bases[find(named, BASE, name, field)]
        label = {"refiner_checkpoint": "Refiner", "hr_checkpoint_name": "Hires checkpoint"}[field]
        fields[label] = f"{stem(file.name)} [{file.sha256[:10]}]"
    if "Refiner" in fields:
        fields["Refiner switch at"] = request.refiner_switch_at
    return fields


def _controlnet_fields(request: Generation, files: list[CachedModel]) -> dict[str, Any]:
    nets = [file for file in files if file.type == CONTROLNET]
    fields = {}
    for index, unit in enumerate(request.controlnet):
        file = nets[find([(CONTROLNET, net.name) for net in nets], CONTROLNET, unit.model, "controlnet")]
        said = {
            "Module": unit.module,
            "Model": f"{stem(file.name)} [{file.sha256[:8]}]",
            "Weight": unit.weight,
            "Resize Mode": unit.resize_mode,
            "Processor Res": unit.processor_res,
            "Threshold A": unit.threshold_a,
            "Threshold B": unit.threshold_b,
            "Guidance Start": unit.guidance_start,
            "Guidance End": unit.guidance_end,
            "Control Mode": unit.control_mode,
        }
        fields[f"ControlNet {index}"] = ", ".join(f"{name}: {value}" for name, value in said.items())
    return fields


def _plot_fields(plot: Plot | None) -> dict[str, Any]:
    if plot is None:
        return {}
    fields: dict[str, Any] = {"Script": "X/Y/Z plot"}
    for letter, axis in (("X", plot.x), ("Y", plot.y), ("Z", plot.z)):
        if axis.name != NOTHING:
            values = ", ".join(str(value) for value in axis.values)
            fields |= {f"{letter} Type": axis.name, f"{letter} Values": values}
    return fields
