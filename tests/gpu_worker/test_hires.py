"""The second pass of txt2img against diffusers' img2img pipeline on the first pass's scaled latents."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image

from gpu_worker.models import weights
from gpu_worker.pictures.canvas import Canvas
from gpu_worker.tasks import hires, stages, txt2img
from services.common.payloads import Txt2Img
from tests.gpu_worker.conftest import as_cached
from tests.gpu_worker.driving import assert_close, changed, crew, drive, latents, steps_of, txt2img_of
from tests.gpu_worker.reference import pipeline_of, scheduler_of

REQUEST = txt2img_of(
    prompt="a red circle",
    negative_prompt="blurry",
    steps=3,
    width=64,
    height=64,
    seed=3,
    enable_hr=True,
    hr_scale=1.5,
    hr_second_pass_steps=2,
    denoising_strength=0.6,
)


@pytest.fixture(scope="module")
def models(tiny_checkpoint: Path) -> weights.Models:
    return weights.load(as_cached(tiny_checkpoint), None, "cpu")


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint: Path, models: weights.Models, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("config")
    parts = pipeline_of(tiny_checkpoint, models.text_encoders[0].tokenizer, folder).components
    made = StableDiffusionImg2ImgPipeline(**parts | {"image_encoder": None}, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def final_latents(request: Txt2Img, models: weights.Models) -> Any:
    """A task of both passes up to the final latents."""
    first = yield from latents(request, models)
    second = hires.begin(request, Canvas(), crew(models), crew(models))
    return (yield from hires.denoised(second, first, 0, lambda _: None))


def expected(pipeline: Any, request: Txt2Img, scaled: torch.Tensor) -> torch.Tensor:
    second = request.second_pass
    assert second is not None
    seeds = [request.seed + row for row in range(request.batch_size)]
    pipeline.scheduler = scheduler_of(second.sampler_name, seeds)
    found: torch.Tensor = pipeline(
        prompt=[second.prompt] * len(seeds),
        negative_prompt=[second.negative_prompt] * len(seeds),
        image=scaled,
        strength=min(1.0, (second.num_steps + 0.5) / second.steps),
        num_inference_steps=second.steps,
        guidance_scale=second.cfg_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
    ).images
    return found


@pytest.mark.slow
def test_second_passes_in_company_have_the_latents_of_img2img_on_the_first(
    models: weights.Models, pipeline: Any
) -> None:
    modes = [("Latent", "bilinear", False), ("Latent (antialiased)", "bilinear", True)]
    modes += [("Latent (bicubic)", "bicubic", False), ("Latent (nearest-exact)", "nearest-exact", False)]
    requests = [
        changed(
            REQUEST,
            hr_upscaler=name,
            seed=index,
            steps=3 + index,
            hr_sampler_name=("", "DPM++ 2M Karras", "Heun", "DPM++ SDE")[index],
            hr_prompt=("", "a blue square")[index % 2],
            batch_size=1 + (index == 2),
        )
        for index, (name, _, _) in enumerate(modes)
    ]
    found = drive([(index, final_latents(request, models)) for index, request in enumerate(requests)])
    firsts = drive([(0, latents(request, models)) for request in requests])
    for request, latent, first, (_, mode, antialias) in zip(requests, found, firsts, modes, strict=True):
        scaled = torch.nn.functional.interpolate(first, (12, 12), mode=mode, antialias=antialias)
        assert_close(latent, expected(pipeline, request, scaled))


def test_pixels_are_scaled_where_the_upscaler_is_of_pixels(models: weights.Models) -> None:
    first = drive([(0, latents(REQUEST, models))])[0]
    with torch.inference_mode():
        picture = Image.fromarray(stages.pixels_of(models, first))
        for name, resampling in (("Lanczos", 1), ("Nearest", 0), ("None", 1)):
            task = hires.upscaled(changed(REQUEST, hr_upscaler=name), first, models, models)
            larger = np.asarray(picture.resize((96, 96), Image.Resampling(resampling)))
            assert_close(drive([(0, task)])[0], stages.latents_of(models, stages.as_tensor(larger)))


def test_without_denoising_the_scaled_picture_stays_as_it_is(models: weights.Models) -> None:
    request, progress = changed(REQUEST, denoising_strength=0, hr_upscaler="Lanczos"), list[int]()
    first = drive([(0, latents(request, models))])[0]
    scaled = drive([(0, hires.upscaled(request, first, models, models))])[0]
    assert_close(drive([(0, final_latents(request, models))])[0], scaled)
    images = drive([(0, txt2img.generate(request, Canvas(), crew(models), crew(models), progress.append))])[0]
    assert np.array_equal(images[0], stages.pixels_of(models, scaled))
    assert progress == [1, 2, 3]


def test_what_is_too_much_is_cut_evenly(models: weights.Models) -> None:
    request = changed(REQUEST, hr_resize_x=128, hr_resize_y=96)
    first = torch.randn(1, 4, 8, 8)
    found = drive([(0, hires.upscaled(request, first, models, models))])[0]
    assert torch.equal(found, torch.nn.functional.interpolate(first, (16, 16), mode="bilinear")[:, :, 2:14])


def test_both_passes_count_as_steps_and_make_the_larger_picture(models: weights.Models) -> None:
    progress: list[int] = []
    request = changed(REQUEST, n_iter=2)
    images = drive([(0, txt2img.generate(request, Canvas(), crew(models), crew(models), progress.append))])[0]
    assert progress == list(range(1, 11))
    assert [image.shape for image in images] == [(96, 96, 3)] * 2


def test_parts_of_a_changing_prompt_go_on_counting_in_the_second_pass(models: weights.Models) -> None:
    """As A1111 counts since 1.6: 1.5 is the middle of the second pass, 4 its first step after three."""
    request = changed(REQUEST, prompt="[a:b:1.5] [c:d:4] [e:f:0.5]", hr_second_pass_steps=3)
    second = request.second_pass
    assert second is not None
    found = [step.guidance for step in steps_of(second, models)]
    for step, text in enumerate(("a c f", "a c f", "b d f")):
        same = steps_of(txt2img_of(prompt=text, width=96, height=96), models)[0].guidance
        assert torch.equal(found[step].positives[0][0].text, same.positives[0][0].text)
