"""A refiner takes over in the middle: against diffusers' pipelines, whose UNet and texts are exchanged there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline

from gpu_worker.models import tiny, weights
from services.common.payloads import Txt2Img
from tests.gpu_worker.conftest import as_cached
from tests.gpu_worker.driving import assert_close, changed, drive, latents, txt2img_of
from tests.gpu_worker.reference import pipeline_of, scheduler_of
from tests.gpu_worker.tiny_sdxl import TinySdxl, make

REQUEST = txt2img_of(
    prompt="a red circle",
    negative_prompt="blurry",
    steps=6,
    width=64,
    height=64,
    seed=3,
    refiner_checkpoint="refiner",
    refiner_switch_at=0.5,
)


@pytest.fixture(scope="module")
def checkpoints(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    other = tmp_path_factory.mktemp("other") / "refiner.safetensors"
    tiny.write(other, seed=2)
    return [tiny_checkpoint, other]


@pytest.fixture(scope="module")
def models(checkpoints: list[Path]) -> list[weights.Models]:
    return [weights.load(as_cached(path), None, "cpu") for path in checkpoints]


@pytest.fixture(scope="module")
def pipelines(checkpoints: list[Path], models: list[weights.Models], tmp_path_factory: pytest.TempPathFactory) -> Any:
    tokenizer = models[0].text_encoders[0].tokenizer
    return [pipeline_of(path, tokenizer, tmp_path_factory.mktemp("config")) for path in checkpoints]


def expected(pipelines: Any, request: Txt2Img, switch_step: int) -> torch.Tensor:
    """The base's pipeline, which goes on with the other's UNet and texts after so many steps."""
    base, refiner = pipelines
    unet = base.unet
    base.scheduler = scheduler_of(request.sampler_name, [request.seed])
    is_guided = request.cfg_scale > 1
    positive, negative = refiner.encode_prompt(request.prompt, "cpu", 1, is_guided, request.negative_prompt)
    num_evaluations = 0

    def exchange(_: Any, __: int, ___: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        nonlocal num_evaluations
        num_evaluations += 1
        if num_evaluations != switch_step * base.scheduler.order:
            return {}
        base.unet = refiner.unet
        return {"prompt_embeds": torch.cat([negative, positive]) if is_guided else positive}

    try:
        found: torch.Tensor = base(
            request.prompt,
            negative_prompt=request.negative_prompt,
            num_inference_steps=request.steps,
            guidance_scale=request.cfg_scale,
            width=64,
            height=64,
            generator=[torch.Generator().manual_seed(request.seed)],
            output_type="latent",
            callback_on_step_end=exchange,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        ).images
    finally:
        base.unet = unet
    return found


@pytest.mark.slow
def test_jobs_in_company_go_on_with_the_refiner_from_their_own_steps_on(
    models: list[weights.Models], pipelines: Any
) -> None:
    base, refiner = models
    cases = [("Euler a", 6, 0.5, 3), ("DPM++ 2M Karras", 5, 0.5, 3), ("Heun", 4, 0.75, 3), ("LMS", 7, 0.2, 2)]
    requests = [
        changed(
            REQUEST, sampler_name=name, steps=steps, refiner_switch_at=switch, seed=seed, cfg_scale=(7, 1)[seed % 2]
        )
        for seed, (name, steps, switch, _) in enumerate(cases)
    ]
    tasks = [(index, latents(request, base, refiner=refiner)) for index, request in enumerate(requests)]
    alone = changed(REQUEST, seed=9, refiner_checkpoint="")
    company = [(0, latents(alone, base)), (2, latents(alone, refiner))]
    for request, found, case in zip(requests, drive(tasks + company), cases, strict=False):
        assert_close(found, expected(pipelines, request, case[3]))


def test_it_may_come_at_once_or_never(models: list[weights.Models]) -> None:
    base, refiner = models
    for switch_at, only in ((0.0, refiner), (1.0, base)):
        request = changed(REQUEST, refiner_switch_at=switch_at)
        found, plain = drive([(0, latents(request, base, refiner=refiner)), (0, latents(request, only))])
        assert torch.equal(found, plain)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinySdxl, TinySdxl]:
    folder = tmp_path_factory.mktemp("sdxl")
    return make(folder / "base.safetensors"), make(folder / "refiner.safetensors", is_refiner=True, seed=1)


def test_sdxls_refiner_reads_scores_and_one_text_encoder(sdxl: tuple[TinySdxl, TinySdxl]) -> None:
    base, refiner = sdxl
    assert (base.models.family, refiner.models.family) == ("sdxl", "sdxl_refiner")
    request = changed(REQUEST, sampler_name="Euler", steps=4)
    options: dict[str, Any] = {
        "negative_prompt": request.negative_prompt,
        "num_inference_steps": 4,
        "guidance_scale": 7.0,
        "output_type": "latent",
    }
    base.pipeline.scheduler = scheduler_of("Euler", 0)
    generator = [torch.Generator().manual_seed(request.seed)]
    half = base.pipeline(request.prompt, width=64, height=64, generator=generator, denoising_end=0.5, **options).images
    second = StableDiffusionXLImg2ImgPipeline(**refiner.components, requires_aesthetics_score=True)
    second.set_progress_bar_config(disable=True)
    expected = second(
        request.prompt,
        image=half,
        denoising_start=0.5,
        original_size=(64, 64),
        target_size=(64, 64),
        **options,
    ).images
    assert_close(drive([(0, latents(request, base.models, refiner=refiner.models))])[0], expected)
