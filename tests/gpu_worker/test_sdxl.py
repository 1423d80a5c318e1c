"""SDXL: a tiny checkpoint in Stability's layout against diffusers' own pipeline."""

from typing import Any

import numpy as np
import pytest
import torch

from gpu_worker.models import prompt, weights
from gpu_worker.pictures.canvas import Canvas
from gpu_worker.tasks import txt2img
from services.common.payloads import samplers
from tests.gpu_worker.driving import (
    assert_close,
    changed,
    crew,
    drive,
    latents,
    txt2img_of,
)
from tests.gpu_worker.reference import pipeline_latents, scheduler_of
from tests.gpu_worker.tables import in_companies, slow
from tests.gpu_worker.tiny_sdxl import TinySdxl, make


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
