"""What a job leaves behind: PNG files with A1111's `parameters` text, and `_param.json` (contract 10.5)."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from gpu_worker import VERSION
from gpu_worker.cache import CachedModel
from services.common.payloads import Edit, Generation, Img2Img, Txt2Img
from services.common.payloads.models import BASE, CONTROLNET, EMBEDDING, LORA, VAE, find, stem


def named(files: list[CachedModel], kind: str) -> CachedModel | None:
    """The model of that type, where a job has one at most."""
    return next((file for file in files if file.type == kind), None)


def hashes(files: list[CachedModel]) -> dict[str, str]:
    """The SHA-256 of every model behind a picture, by the names that A1111 has for them. Further checkpoints have none
    there and are `model:<name>`."""
    names = {BASE: "model:{}", VAE: "vae", LORA: "lora:{}", EMBEDDING: "embed:{}", CONTROLNET: "controlnet:{}"}
    found = {names[file.type].format(stem(file.name)): file.sha256 for file in files}
    return {"model": found.pop(f"model:{stem(files[0].name)}")} | found


def png(pixels: NDArray[np.uint8], infotext: str) -> bytes:
    """Encodes pixels of shape (height, width, 3) with the text in the chunk `parameters`."""
    text = PngInfo()
    text.add_text("parameters", infotext)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", pnginfo=text, compress_level=4)
    return file.getvalue()


def plain_png(image: Image.Image) -> bytes:
    """Encodes a picture that no model made."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=4)
    return file.getvalue()


def edit_json(request: Edit, html_info: str, endpoint_name: str, job_id: str) -> bytes:
    """The content of `<job id>_param.json` where no model was at work."""
    content = {
        "parameters": request.echo(),
        "html_info": html_info,
        "endpoint_name": endpoint_name,
        "inference_id": job_id,
    }
    return json.dumps(content, ensure_ascii=False).encode()


def infotext(request: Generation, index: int, files: list[CachedModel]) -> str:
    """The text that A1111 writes into image `index` of the job, and reads back from a dropped picture."""
    base, vae = named(files, BASE), named(files, VAE)
    assert base is not None
    resized_from = f"{request.seed_resize_from_w}x{request.seed_resize_from_h}"
    fields: dict[str, Any] = {
        "Steps": request.steps,
        "Sampler": request.sampler_name,
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
        **_img2img_fields(request),
        **_second_pass_fields(request),
        **_refiner_fields(request, files),
        **_controlnet_fields(request, files),
        "Clip skip": request.clip_skip if request.clip_skip > 1 else None,
        "Hashes": json.dumps(hashes(files)),
        "Version": f"esd {VERSION}",
    }
    lines = [request.prompt]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    lines.append(", ".join(f"{key}: {value}" for key, value in fields.items() if value is not None))
    return "\n".join(lines)


def _img2img_fields(request: Generation) -> dict[str, Any]:
    if not isinstance(request, Img2Img):
        return {}
    fields: dict[str, Any] = {"Denoising strength": request.denoising_strength}
    if request.mask is not None:
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
        "Denoising strength": request.denoising_strength,
        "Hires upscale": None if is_resized else request.hr_scale,
        "Hires resize": f"{request.hr_resize_x}x{request.hr_resize_y}" if is_resized else None,
        "Hires steps": request.hr_second_pass_steps or None,
        "Hires upscaler": request.hr_upscaler,
        "Hires sampler": request.hr_sampler_name or None,
        "Hires prompt": json.dumps(request.hr_prompt) if request.hr_prompt else None,
        "Hires negative prompt": json.dumps(request.hr_negative_prompt) if request.hr_negative_prompt else None,
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
        fields[f"ControlNet {index}"] = json.dumps(", ".join(f"{name}: {value}" for name, value in said.items()))
    return fields


def param_json(
    request: Generation, files: list[CachedModel], infotexts: list[str], endpoint_name: str, job_id: str
) -> bytes:
    """The content of `<job id>_param.json`; its `info` is JSON text inside JSON."""
    base, vae = named(files, BASE), named(files, VAE)
    assert base is not None
    num_images = len(infotexts)
    seeds = [request.seed_of(index) for index in range(num_images)]
    subseeds = [request.subseed_of(index) for index in range(num_images)]
    info = {
        "prompt": request.prompt,
        "all_prompts": [request.prompt] * num_images,
        "negative_prompt": request.negative_prompt,
        "all_negative_prompts": [request.negative_prompt] * num_images,
        "seed": request.seed,
        "all_seeds": seeds,
        "subseed": request.subseed,
        "all_subseeds": subseeds,
        "subseed_strength": request.subseed_strength,
        "width": request.width,
        "height": request.height,
        "sampler_name": request.sampler_name,
        "cfg_scale": request.cfg_scale,
        "steps": request.steps,
        "batch_size": request.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": stem(base.name),
        "sd_model_hash": base.sha256[:10],
        "sd_vae_name": vae.name if vae else None,
        "sd_vae_hash": vae.sha256[:10] if vae else None,
        "seed_resize_from_w": request.seed_resize_from_w or -1,
        "seed_resize_from_h": request.seed_resize_from_h or -1,
        "denoising_strength": request.denoising_strength
        if isinstance(request, Img2Img) or (isinstance(request, Txt2Img) and request.enable_hr)
        else None,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": infotexts,
        "styles": [],
        "job_timestamp": datetime.now(UTC).strftime("%Y%m%d%H%M%S"),
        "clip_skip": request.clip_skip,
        "is_using_inpainting_conditioning": False,
        "ignored": request.ignored,
        "hashes": hashes(files),
        "version": f"esd {VERSION}",
    }
    content = {
        "parameters": request.echo(),
        "info": json.dumps(info, ensure_ascii=False),
        "endpoint_name": endpoint_name,
        "inference_id": job_id,
    }
    return json.dumps(content, ensure_ascii=False).encode()
