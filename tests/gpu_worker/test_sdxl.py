"""SDXL: a tiny checkpoint in Stability's layout against diffusers' own pipeline."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline
from safetensors.torch import load_file, save_file

from gpu_worker import prompt, weights
from gpu_worker.canvas import Canvas, prepared
from gpu_worker.tasks import hires, img2img, txt2img
from services.common.payloads import samplers
from tests.gpu_worker.conftest import as_cached
from tests.gpu_worker.driving import (
    assert_close,
    changed,
    crew,
    drive,
    img2img_latents,
    img2img_of,
    latents,
    txt2img_of,
)
from tests.gpu_worker.reference import pipeline_latents, scheduler_of
from tests.gpu_worker.tables import in_companies, slow
from tests.gpu_worker.tiny_sdxl import TinySdxl, make
from tests.pictures import encoded, mask, noise


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> TinySdxl:
    return make(tmp_path_factory.mktemp("sdxl") / "tiny-xl.safetensors")


@pytest.fixture(scope="module")
def models(sdxl: TinySdxl) -> weights.Models:
    return sdxl.models


@pytest.fixture(scope="module")
def pipeline(sdxl: TinySdxl) -> Any:
    return sdxl.pipeline


REQUEST = txt2img_of(prompt="a red circle", steps=3, width=64, height=64, seed=3, batch_size=2)
NAMES = [*samplers.SAMPLERS, "DPM++ 2M Karras"]
FIRST, *OTHERS = in_companies(NAMES)


def test_pixels_equal_those_of_the_diffusers_pipeline(models: weights.Models, pipeline: Any) -> None:
    assert models.is_sdxl
    pipeline.scheduler = scheduler_of("Euler", 0)
    expected = pipeline(
        [REQUEST.prompt] * 2,
        num_inference_steps=3,
        guidance_scale=7.0,
        width=64,
        height=64,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
        output_type="np",
    ).images
    pixels = np.stack(drive([(0, txt2img.generate(REQUEST, Canvas(), crew(models), None, lambda _: None))])[0])
    assert np.abs(pixels / 255 - expected).max() <= 0.5 / 255 + 1e-5


@pytest.mark.parametrize("names", [FIRST, *slow(OTHERS)], ids=", ".join)
def test_a_job_in_company_has_the_latents_of_the_diffusers_pipeline(
    models: weights.Models, pipeline: Any, names: list[str]
) -> None:
    requests = [
        changed(
            REQUEST,
            sampler_name=name,
            prompt=f"picture {index}",
            seed=index,
            steps=3 + index % 3,
            cfg_scale=(7.0, 1.0, 3.0)[index % 3],
            batch_size=1 + index % 2,
        )
        for index, name in enumerate(names)
    ]
    tasks = [(index, latents(request, models)) for index, request in enumerate(requests)]
    for request, found in zip(requests, drive(tasks, max_rows=5), strict=True):
        assert_close(found, pipeline_latents(pipeline, request.sampler_name, request))


def test_img2img_has_the_latents_of_the_diffusers_pipeline(sdxl: TinySdxl, models: weights.Models) -> None:
    fields = {"prompt": "a red circle", "steps": 6, "width": 64, "height": 64, "seed": 3, "denoising_strength": 0.5}
    request = img2img_of(**fields, init_images=[encoded(noise())])
    with torch.inference_mode():
        originals = img2img.encoded(request, prepared(request), models)
    reference = StableDiffusionXLImg2ImgPipeline(**sdxl.components)
    reference.scheduler = scheduler_of("Euler", 0)
    reference.set_progress_bar_config(disable=True)
    expected = reference(
        request.prompt,
        image=originals.clone(),
        strength=4.5 / 6,
        num_inference_steps=6,
        guidance_scale=7.0,
        original_size=(64, 64),
        target_size=(64, 64),
        generator=[torch.Generator().manual_seed(3)],
        output_type="latent",
    ).images
    assert_close(drive([(0, img2img_latents(request, models))])[0], expected)


@pytest.mark.parametrize("text", ["", "a cat", "A photo, of: a cat; 8k B&W", "word, " * 37])
def test_a_plain_prompt_is_encoded_as_by_diffusers_bit_for_bit(
    models: weights.Models, pipeline: Any, text: str
) -> None:
    expected, _, pooled, _ = pipeline.encode_prompt(text, device="cpu", do_classifier_free_guidance=False)
    with torch.inference_mode():
        found = prompt.encode(models, text, 1)
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], pooled)


def test_a_long_prompt_has_the_pooled_text_of_its_first_chunk(models: weights.Models) -> None:
    with torch.inference_mode():
        long, pooled = prompt.encode(models, "a cat BREAK (a dog:1.2)", 1)
        first, first_pooled = prompt.encode(models, "a cat", 1)
    assert long.shape == (1, 2 * 77, first.shape[2])
    assert torch.allclose(pooled, first_pooled, atol=1e-6)
    assert torch.allclose(long[:, :77], first, atol=1e-6)


@pytest.mark.parametrize("name", ["Euler a", "DPM++ 2M", "DDIM"])
def test_inpainting_has_the_latents_of_the_diffusers_pipeline(
    sdxl: TinySdxl, models: weights.Models, name: str
) -> None:
    fields = {"prompt": "a red circle", "steps": 6, "width": 64, "height": 64, "seed": 3, "denoising_strength": 0.5}
    drawn = mask((16, 8, 48, 40))
    given = {"mask": encoded(drawn), "mask_blur": 0, "inpainting_fill": 1, "inpaint_full_res": False}
    request = img2img_of(**fields, **given, init_images=[encoded(noise())], sampler_name=name)
    reference = StableDiffusionXLInpaintPipeline(**sdxl.components)
    reference.scheduler = scheduler_of(name, [3])
    reference.set_progress_bar_config(disable=True)
    with torch.inference_mode():
        originals = img2img.encoded(request, prepared(request), models)
    expected = reference(
        request.prompt,
        image=originals.clone(),
        mask_image=torch.from_numpy(np.asarray(drawn, dtype=np.float32) / 255)[None, None],
        masked_image_latents=torch.zeros(1, 4, 8, 8),
        strength=4.5 / 6,
        num_inference_steps=6,
        guidance_scale=7.0,
        width=64,
        height=64,
        generator=[torch.Generator().manual_seed(3)],
        output_type="latent",
    ).images
    company = latents(changed(REQUEST, seed=9), models)
    assert_close(drive([(0, img2img_latents(request, models)), (1, company)])[0], expected)


def test_a_second_pass_has_the_latents_of_img2img_on_the_first(sdxl: TinySdxl, models: weights.Models) -> None:
    """It tells the UNet its own, larger size."""
    request = changed(
        REQUEST, batch_size=1, enable_hr=True, hr_scale=1.5, hr_second_pass_steps=4, denoising_strength=0.6
    )
    second = hires.begin(request, Canvas(), crew(models), crew(models))
    (first,) = drive([(0, latents(request, models))])
    reference = StableDiffusionXLImg2ImgPipeline(**sdxl.components)
    reference.scheduler = scheduler_of("Euler", 0)
    reference.set_progress_bar_config(disable=True)
    expected = reference(
        request.prompt,
        image=torch.nn.functional.interpolate(first, (12, 12), mode="bilinear"),
        strength=(request.second_pass.num_steps + 0.5) / request.second_pass.steps,
        num_inference_steps=request.second_pass.steps,
        guidance_scale=7.0,
        original_size=(96, 96),
        target_size=(96, 96),
        generator=[torch.Generator().manual_seed(3)],
        output_type="latent",
    ).images
    assert_close(drive([(0, hires.denoised(second, first, 0, lambda _: None))])[0], expected)


def test_an_inpainting_unet_reads_the_mask_and_what_stays(sdxl: TinySdxl, tmp_path: Path) -> None:
    state = load_file(sdxl.path)
    name = "model.diffusion_model.input_blocks.0.0.weight"
    state[name] = torch.cat([state[name], torch.ones(16, 5, 3, 3)], 1)
    path = tmp_path / "inpainting.safetensors"
    save_file(state, path, metadata={"esd_config": json.dumps(sdxl.config)})
    models = weights.load(as_cached(path), None, "cpu")
    given = {"mask": encoded(mask((0, 0, 32, 64))), "mask_blur": 0, "inpainting_fill": 1, "inpaint_full_res": False}
    fields = {"prompt": "a red circle", "steps": 4, "width": 64, "height": 64, "seed": 3, "denoising_strength": 1}
    request = img2img_of(**fields, init_images=[encoded(noise())], **given)
    painted = torch.zeros(1, 1, 64, 64)
    painted[..., :32] = 1
    pixels = torch.from_numpy(np.asarray(noise(), dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    with torch.inference_mode():
        kept = models.vae.encode(pixels * (1 - painted)).latent_dist.mean * models.vae.config.scaling_factor
        wish = next(img2img_latents(request, models))
    assert models.is_sdxl
    assert_close(wish.step.context, torch.cat([painted[..., ::8, ::8], kept], 1))
    assert bool(drive([(0, img2img_latents(request, models))])[0].isfinite().all())
