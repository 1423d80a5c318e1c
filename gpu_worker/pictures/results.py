"""What a job leaves behind: PNG files that say how they were made, and `_param.json` (contract 10.5)."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from gpu_worker import VERSION
from gpu_worker.pictures.infotext import Made, denoising_strength, hashes, named
from gpu_worker.pictures.provenance import CHUNK, Provenance
from services.common.payloads import Generation
from services.common.payloads.models import BASE, VAE, stem


def png(image: Image.Image, making: str = "", infotext: str = "") -> bytes:
    """Encodes a picture with what is told of its making, and A1111's text, where there are any."""
    text = PngInfo()
    if infotext:
        text.add_text("parameters", infotext)
    if making:
        text.add_text(CHUNK, making)
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=text, compress_level=4)
    return file.getvalue()


def param_json(provenance: Provenance, endpoint_name: str, **told: Any) -> bytes:
    """The content of `<job id>_param.json`. Its `info`, out of what is told, is JSON text inside JSON."""
    info = told.pop("info") | {
        "hashes": hashes(provenance.files),
        "version": f"esd {VERSION}",
        "engine": provenance.engine,
    }
    content = {
        "parameters": provenance.request.echo(),
        **told,
        "info": json.dumps(info, ensure_ascii=False),
        "endpoint_name": endpoint_name,
        "inference_id": provenance.job_id,
    }
    return json.dumps(content, ensure_ascii=False).encode()


def info(
    request: Generation, makings: list[Made], infotexts: list[str], ignored: list[str], is_inpainting: bool
) -> dict[str, Any]:
    """A1111's `info` of a job, with the names of what was ignored, also of its models. `is_inpainting`: its UNet was
    told what to paint on."""
    files = makings[0].files
    base, vae = named(files, BASE), named(files, VAE)
    assert base is not None
    return {
        "prompt": request.prompt,
        "all_prompts": [made.request.prompt for made in makings],
        "negative_prompt": request.negative_prompt,
        "all_negative_prompts": [made.request.negative_prompt for made in makings],
        "seed": request.seed,
        "all_seeds": [made.request.seed_of(made.index) for made in makings],
        "subseed": request.subseed,
        "all_subseeds": [made.request.subseed_of(made.index) for made in makings],
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
        "denoising_strength": denoising_strength(request),
        "extra_generation_params": {},
        "index_of_first_image": request.plot.num_grids if request.plot else 0,
        "infotexts": infotexts,
        "styles": [],
        "job_timestamp": datetime.now(UTC).strftime("%Y%m%d%H%M%S"),
        "clip_skip": request.clip_skip,
        "is_using_inpainting_conditioning": is_inpainting,
        "ignored": request.ignored + ignored,
    }
