"""Pictures and latents against an independent source: diffusers' own pipeline with its own single-file loading."""

import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler

from gpu_worker.job import JobError
from gpu_worker.models import tiny, weights
from gpu_worker.pictures.canvas import Canvas
from gpu_worker.tasks import txt2img
from services.common.payloads import Generation
from tests.gpu_worker.conftest import as_cached
from tests.gpu_worker.driving import assert_close, changed, crew, drive, latents, txt2img_of
from tests.gpu_worker.reference import BETAS, pipeline_latents, pipeline_of, scheduler_of
from tests.gpu_worker.tables import COMPANIES, FEW, slow

REQUEST = txt2img_of(prompt="a red circle", negative_prompt="blurry", steps=4, width=64, height=64, seed=3)


@pytest.fixture(scope="module")
def models(tiny_checkpoint: Path) -> weights.Models:
    def no_network(*_: Any) -> None:
        raise AssertionError("loading a checkpoint opened a socket")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", no_network)
        patch.setattr(socket, "getaddrinfo", no_network)
        return weights.load(as_cached(tiny_checkpoint), None, "cpu")


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint: Path, models: weights.Models, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return pipeline_of(tiny_checkpoint, models.text_encoders[0].tokenizer, tmp_path_factory.mktemp("config"))


def run(request: Generation, models: weights.Models) -> tuple[list[int], np.ndarray]:
    """Progress and pixels."""
    progress: list[int] = []
    images = drive([(0, txt2img.generate(request, Canvas(), crew(models), None, progress.append))])[0]
    return progress, np.stack(images)


def expected_latents(pipeline: Any, request: Generation) -> torch.Tensor:
    return pipeline_latents(pipeline, request.sampler_name, request)


@pytest.mark.parametrize("name", FEW)
def test_a_job_alone_has_the_latents_of_the_diffusers_pipeline(
    pipeline: Any, models: weights.Models, name: str
) -> None:
    request = changed(REQUEST, sampler_name=name, steps=5)
    assert_close(drive([(0, latents(request, models))])[0], expected_latents(pipeline, request))


@pytest.mark.parametrize("names", COMPANIES, ids=", ".join)
def test_a_job_among_five_others_that_join_and_leave_has_the_latents_of_the_diffusers_pipeline(
    pipeline: Any, models: weights.Models, names: list[str]
) -> None:
    """Every sampler of the table is once in such a company, with guidance and without, of one row or two."""
    requests = [
        changed(
            REQUEST,
            sampler_name=name,
            prompt=f"picture {index}",
            seed=index,
            steps=4 + 2 * index % 5,
            cfg_scale=(7.0, 1.0, 4.5, 0.0, 12.0, 2.0)[index],
            batch_size=1 + (index == 2),
        )
        for index, name in enumerate(names)
    ]
    tasks = [(2 * index % 7, latents(request, models)) for index, request in enumerate(requests)]
    for request, found in zip(requests, drive(tasks), strict=True):
        assert_close(found, expected_latents(pipeline, request))


@pytest.mark.parametrize(
    "name",
    ["Euler a", *slow(["DPM++ SDE", "DPM++ 2M SDE", "LCM", "DPM2 a"])],
)
def test_every_image_of_a_batch_has_noise_of_its_own_seed(pipeline: Any, models: weights.Models, name: str) -> None:
    request = changed(REQUEST, sampler_name=name, batch_size=2)
    found = drive([(0, latents(request, models))])[0]
    for index in range(2):
        alone = changed(REQUEST, sampler_name=name, seed=REQUEST.seed + index)
        assert_close(found[index : index + 1], expected_latents(pipeline, alone))


@pytest.mark.parametrize(("prompt", "cfg_scale"), [("a cat", 0.5), ("a cat :0.5", 1)])
def test_a_guidance_scale_below_one_leaves_some_of_the_negative_prompt(
    models: weights.Models, prompt: str, cfg_scale: float
) -> None:
    """In a single step the latents are as linear in the guidance as the prediction is."""
    request = changed(REQUEST, sampler_name="Euler", steps=1, negative_prompt="a dog")
    half = changed(request, prompt=prompt, cfg_scale=cfg_scale)
    ends = [changed(request, prompt=text, cfg_scale=1) for text in ("a cat", "a dog")]
    found, cat, dog = (drive([(0, latents(each, models))])[0] for each in (half, *ends))
    assert_close(found, (cat + dog) / 2)


def test_an_ancestral_sampler_without_new_noise_is_the_one_that_has_none(pipeline: Any, models: weights.Models) -> None:
    request = changed(REQUEST, sampler_name="Euler a", eta=0)
    assert_close(drive([(0, latents(request, models))])[0], pipeline_latents(pipeline, "Euler", request))


def test_ddim_takes_eta(pipeline: Any, models: weights.Models) -> None:
    request = changed(REQUEST, sampler_name="DDIM", eta=0.7)
    found = drive([(0, latents(request, models))])[0]
    assert_close(found, pipeline_latents(pipeline, "DDIM", request))
    assert not torch.allclose(found, expected_latents(pipeline, changed(request, eta=0.0)))


@pytest.mark.parametrize("sampler", ["Euler a", *slow(["DPM2", "DDIM"])])
def test_below_a_noise_level_every_other_evaluation_goes_without_the_negative_prompt(
    pipeline: Any, models: weights.Models, sampler: str
) -> None:
    """The pipeline does so when it is told, between its evaluations, to take one text or both."""
    request = changed(REQUEST, sampler_name=sampler, steps=6, s_min_uncond=2.0)
    scheduler = scheduler_of(sampler, request.seed)
    scheduler.set_timesteps(request.steps)
    alphas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square().neg().add(1).cumprod(0)
    levels = [float((1 / alphas[round(float(time))] - 1).sqrt()) for time in scheduler.timesteps]
    assert levels[-1] < request.s_min_uncond < levels[0]
    skipped = [index for index, level in enumerate(levels) if index % 2 and level < request.s_min_uncond]
    assert 0 < len(skipped) < len(levels) // 2
    positive, negative = pipeline.encode_prompt(request.prompt, "cpu", 1, True, request.negative_prompt)

    def before_the_next(pipe: Any, index: int, *_: Any) -> dict[str, Any]:
        is_skipped = index + 1 in skipped
        pipe._guidance_scale = 1.0 if is_skipped else request.cfg_scale
        return {"prompt_embeds": positive if is_skipped else torch.cat([negative, positive])}

    expected = pipeline_latents(
        pipeline,
        sampler,
        request,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        callback_on_step_end=before_the_next,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )
    assert_close(drive([(0, latents(request, models))])[0], expected)
    assert not torch.allclose(expected, expected_latents(pipeline, changed(request, s_min_uncond=0.0)))


@pytest.mark.slow
def test_a_seed_delta_is_that_of_the_steps_noise_alone(pipeline: Any, models: weights.Models) -> None:
    request = changed(REQUEST, sampler_name="Euler a", batch_size=2, noise_seed_delta=31337)
    first = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(REQUEST.seed + row)) for row in range(2)]
    expected = pipeline_latents(
        pipeline,
        "Euler a",
        changed(request, seed=request.seed + 31337),
        prompt=[request.prompt] * 2,
        negative_prompt=[request.negative_prompt] * 2,
        latents=torch.cat(first),
    )
    assert_close(drive([(0, latents(request, models))])[0], expected)
    brownian = changed(request, sampler_name="DPM++ SDE")
    assert_close(drive([(0, latents(brownian, models))])[0], expected_latents(pipeline, brownian))


PLOTS = [
    (4, "2, 5, 3", [{"steps": 2}, {"steps": 5}, {"steps": 3}]),
    (9, "Euler a, DDIM", [{"sampler_name": "Euler a"}, {"sampler_name": "DDIM"}]),
    (7, "red, dark blue", [{}, {"prompt": "a dark blue circle"}]),
]
OTHER_PLOTS = [
    (6, "1, 4.5, 12", [{"cfg_scale": 1}, {"cfg_scale": 4.5}, {"cfg_scale": 12}]),
    (1, "7, 3, 99", [{"seed": 7}, {"seed": 3}, {"seed": 99}]),
    (7, "blurry, dark", [{}, {"negative_prompt": "dark"}]),
]


@pytest.mark.parametrize(("axis", "values", "cells"), [*PLOTS, *slow(OTHER_PLOTS)])
def test_a_cell_of_a_plot_has_the_latents_of_the_diffusers_pipeline_with_its_value(
    pipeline: Any, models: weights.Models, axis: int, values: str, cells: list[dict[str, Any]]
) -> None:
    """All cells in one company, as a plot's are. Axes have A1111's numbers."""
    fields = {"prompt": "a red circle", "negative_prompt": "blurry", "steps": 4, "width": 64, "height": 64, "seed": 3}
    plot = txt2img_of(**fields, script_name="x/y/z plot", script_args=[axis, values, [], 0, "", [], 0, "", []])
    found = drive([(index, latents(cell, models)) for index, cell in enumerate(plot.cells())])
    for changes, cell in zip(cells, found, strict=True):
        assert_close(cell, expected_latents(pipeline, txt2img_of(**fields | changes)))


def expected_pixels(pipeline: Any) -> Any:
    """Of REQUEST, in 0..1, by the pipeline with the VAE that it has."""
    pipeline.scheduler = EulerDiscreteScheduler(**BETAS, timestep_spacing="linspace")
    return pipeline(
        REQUEST.prompt,
        negative_prompt=REQUEST.negative_prompt,
        num_inference_steps=4,
        guidance_scale=7.0,
        width=64,
        height=64,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images


def test_pixels_equal_those_of_the_diffusers_pipeline(pipeline: Any, models: weights.Models) -> None:
    progress, pixels = run(REQUEST, models)
    assert progress == [1, 2, 3, 4]
    assert np.abs(pixels / 255 - expected_pixels(pipeline)).max() <= 0.5 / 255 + 1e-5
    assert pixels.std() > 0


@pytest.mark.slow
def test_another_vae_draws_the_same_latents(
    pipeline: Any, models: weights.Models, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write(tmp_path / "other.safetensors", seed=2)
    colours = pipeline_of(tmp_path / "other.safetensors", models.text_encoders[0].tokenizer, tmp_path).vae
    own = expected_pixels(pipeline)
    monkeypatch.setattr(pipeline, "vae", colours)
    found = run(
        REQUEST, weights.load(as_cached(tiny_checkpoint), as_cached(tmp_path / "other.safetensors", "VAE"), "cpu")
    )[1]
    assert np.abs(found / 255 - expected_pixels(pipeline)).max() <= 0.5 / 255 + 1e-5
    assert np.abs(found / 255 - own).max() > 0.1


def test_image_i_of_a_job_is_the_image_of_seed_plus_i_alone(models: weights.Models) -> None:
    progress, together = run(changed(REQUEST, batch_size=2, n_iter=2), models)
    assert progress[-1] == 16
    for index, pixels in enumerate(together):
        alone = run(changed(REQUEST, seed=REQUEST.seed + index), models)[1][0]
        assert np.abs(alone.astype(int) - pixels).max() <= 1


@pytest.mark.parametrize("name", ["Heun", "PLMS", "DPM++ SDE"])
def test_progress_counts_steps_where_a_sampler_needs_more_evaluations(models: weights.Models, name: str) -> None:
    progress = run(changed(REQUEST, sampler_name=name), models)[0]
    assert progress == sorted(progress)
    assert progress[-1] == REQUEST.steps


def test_without_guidance_the_negative_prompt_has_no_effect(models: weights.Models) -> None:
    one = run(changed(REQUEST, cfg_scale=1), models)[1]
    other = run(changed(REQUEST, cfg_scale=1, negative_prompt="something else"), models)[1]
    assert np.array_equal(one, other)


def test_nan_in_the_latents_fails_with_that_word(models: weights.Models, tiny_checkpoint: Path) -> None:
    broken = weights.load(as_cached(tiny_checkpoint), None, "cpu")
    broken.unet.conv_out.bias[0] = float("nan")
    with pytest.raises(JobError, match="NaN"):
        run(REQUEST, broken)


def test_the_tokenizer_gives_clips_own_numbers(models: weights.Models) -> None:
    tokens = models.text_encoders[0].tokenizer("a photo of a cat").input_ids
    assert tokens == [49406, 320, 1125, 539, 320, 2368, 49407]
