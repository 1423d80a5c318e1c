"""SDXL from pictures: img2img, inpainting and ControlNets in company against diffusers' own pipelines."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load_file, save_file

from gpu_worker.models import weights
from gpu_worker.models.controlnet import ControlNet
from services.common.payloads import Img2Img
from tests.gpu_worker import tiny_controlnet
from tests.gpu_worker.conftest import as_cached
from tests.gpu_worker.driving import assert_close, changed, drive, img2img_latents, img2img_of, latents, txt2img_of
from tests.gpu_worker.models import test_controlnet
from tests.gpu_worker.reference import scheduler_of
from tests.gpu_worker.test_img2img import BOX, MASKED, PAINTED, REQUEST, original, put_back
from tests.gpu_worker.tiny_sdxl import TinySdxl, make
from tests.pictures import encoded, mask, noise

pytestmark = pytest.mark.slow

PAINTED_PIXELS = torch.zeros(1, 1, 64, 64)
PAINTED_PIXELS[:, :, BOX[1] : BOX[3], BOX[0] : BOX[2]] = 1


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> TinySdxl:
    return make(tmp_path_factory.mktemp("sdxl") / "tiny-xl.safetensors")


def of_pipeline(
    kind: Any, parts: dict[str, Any], request: Img2Img, kept: torch.Tensor | None = None, **options: Any
) -> torch.Tensor:
    """The final latents of the request, made by diffusers' pipeline alone, or with what A1111 keeps."""
    seeds = [request.seed + row for row in range(request.batch_size)]
    pipeline = kind(**parts)
    pipeline.scheduler = scheduler_of(request.sampler_name, seeds)
    if kept is not None:
        put_back(pipeline.scheduler, kept)
    pipeline.set_progress_bar_config(disable=True)
    found: torch.Tensor = pipeline(
        prompt=[request.prompt] * len(seeds),
        negative_prompt=[request.negative_prompt] * len(seeds) if request.negative_prompt else None,
        image=original(parts["vae"]).repeat(len(seeds), 1, 1, 1),
        strength=min(1.0, (request.num_steps + 0.5) / request.steps),
        num_inference_steps=request.steps,
        guidance_scale=request.cfg_scale,
        original_size=(64, 64),
        target_size=(64, 64),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
        **options,
    ).images
    return found if kept is None else torch.where(PAINTED, found, kept)


def test_jobs_in_company_have_the_latents_of_the_img2img_pipeline(sdxl: TinySdxl) -> None:
    cases = [("Euler a", 0.3), ("Heun", 0.6), ("DDIM", 1.0), ("UniPC", 0.0), ("DPM++ 2M Karras", 0.75)]
    requests = [
        changed(
            REQUEST,
            sampler_name=name,
            denoising_strength=strength,
            seed=index,
            steps=4 + index % 3,
            cfg_scale=(7.0, 1.0, 4.5)[index % 3],
            batch_size=1 + (index == 2),
            negative_prompt=("", "blurry")[index % 2],
        )
        for index, (name, strength) in enumerate(cases)
    ]
    plain = latents(txt2img_of(prompt="a cat", steps=4, width=64, height=64, seed=9), sdxl.models)
    tasks = [(2 * index % 5, img2img_latents(request, sdxl.models)) for index, request in enumerate(requests)]
    for request, found in zip(requests, drive([*tasks, (0, plain)]), strict=False):
        assert_close(found, of_pipeline(StableDiffusionXLImg2ImgPipeline, sdxl.components, request))


def test_inpainting_jobs_in_company_keep_what_is_not_painted_in_the_samplers_noise(sdxl: TinySdxl) -> None:
    requests = [
        changed(MASKED, sampler_name=name, seed=seed, steps=4 + seed, negative_prompt=("", "blurry")[seed % 2])
        for seed, name in enumerate(("Euler a", "DPM++ 2M", "DDIM"))
    ]
    tasks = [(index, img2img_latents(request, sdxl.models)) for index, request in enumerate(requests)]
    kept = original(sdxl.parts["vae"])
    for request, found in zip(requests, drive(tasks), strict=True):
        assert_close(found, of_pipeline(StableDiffusionXLImg2ImgPipeline, sdxl.components, request, kept=kept))


def test_an_inpainting_unet_has_the_latents_of_the_inpainting_pipeline(sdxl: TinySdxl, tmp_path: Path) -> None:
    state = load_file(sdxl.path)
    name = "model.diffusion_model.input_blocks.0.0.weight"
    more = torch.randn(16, 5, 3, 3, generator=torch.Generator().manual_seed(1)) * 0.1
    state[name] = torch.cat([state[name], more], 1)
    path = tmp_path / "inpainting.safetensors"
    save_file(state, path, metadata={"esd_config": json.dumps(sdxl.config)})
    models = weights.load(as_cached(path), None, "cpu")
    assert models.is_sdxl
    assert models.is_inpainting
    stays = 1 - torch.from_numpy(np.asarray(mask(BOX), dtype=np.float32) / 255)
    clean, known = (original(sdxl.parts["vae"], keep=keep) for keep in (1, stays))
    requests = [
        changed(MASKED, seed=seed, sampler_name=name, denoising_strength=strength)
        for seed, (name, strength) in enumerate([("Euler a", 0.6), ("DDIM", 0.3), ("Euler", 0.8)])
    ]
    tasks = [(index, img2img_latents(request, models)) for index, request in enumerate(requests)]
    for request, found in zip(requests, drive(tasks), strict=True):
        expected = of_pipeline(
            StableDiffusionXLInpaintPipeline,
            sdxl.components | {"unet": models.unet},
            request,
            mask_image=PAINTED_PIXELS,
            masked_image_latents=known,
            width=64,
            height=64,
            kept=clean,
        )
        assert_close(found, expected)
        assert_close(found[..., ~PAINTED], clean[..., ~PAINTED])


def test_controlnets_look_at_img2img_as_in_the_diffusers_pipeline(
    sdxl: TinySdxl, monkeypatch: pytest.MonkeyPatch
) -> None:
    nets = [ControlNet(f"net{seed}", tiny_controlnet.make(sdxl.models.unet, seed)) for seed in (0, 1)]
    image = noise(seed=1)
    fields: dict[str, Any] = test_controlnet.FIELDS | {"steps": 6, "init_images": [encoded(image)]}
    units = [test_controlnet.unit(0), test_controlnet.unit(1, weight=0.5)]
    requests = [
        img2img_of(
            **fields | {"sampler_name": name, "denoising_strength": strength, "seed": seed},
            alwayson_scripts={"controlnet": {"args": used}},
        )
        for seed, (name, strength, used) in enumerate([("Euler", 0.5, units), ("DDIM", 0.8, units[:1])])
    ]
    # The middle of what the encoder finds likely, instead of a draw that takes numbers from the noise.
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, *_, **__: self.mode())
    tasks = [
        (index, img2img_latents(request, sdxl.models, test_controlnet.having(request, nets)))
        for index, request in enumerate(requests)
    ]
    for request, found in zip(requests, drive(tasks), strict=True):
        options = {"image": image, "strength": (request.num_steps + 0.5) / request.steps}
        kind = StableDiffusionXLControlNetImg2ImgPipeline
        assert_close(found, test_controlnet.expected(kind, sdxl.components, nets, request, **options))
