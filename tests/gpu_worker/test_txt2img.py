"""Pictures against an independent source: diffusers' own pipeline with its own single-file loading."""

import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from gpu_worker import tiny, weights
from gpu_worker.job import JobError, Txt2Img
from gpu_worker.tasks import txt2img
from tests.gpu_worker.conftest import as_cached

REQUEST = Txt2Img.from_payload(
    {"prompt": "a red circle", "negative_prompt": "blurry", "steps": 4, "width": 64, "height": 64, "seed": 3}, "job"
)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


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
    """diffusers' own way with the same file: from_single_file with a local config, models included."""
    folder = tmp_path_factory.mktemp("config")
    config = tiny.config()
    for part, name in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL")):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(config[part] | {"_class_name": name}))
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    index |= {"vae": ["diffusers", "AutoencoderKL"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    text_encoder = CLIPTextModel(CLIPTextConfig(**config["text_encoder"])).eval()
    prefix = "cond_stage_model.transformer.text_model."
    state = load_file(tiny_checkpoint)
    text_encoder.load_state_dict({key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)})
    from diffusers import AutoencoderKL, UNet2DConditionModel

    options = {"config": str(folder), "local_files_only": True, "torch_dtype": torch.float32}
    made = StableDiffusionPipeline(
        vae=AutoencoderKL.from_single_file(str(tiny_checkpoint), subfolder="vae", **options),
        unet=UNet2DConditionModel.from_single_file(str(tiny_checkpoint), subfolder="unet", **options),
        text_encoder=text_encoder,
        tokenizer=models.text_encoders[0].tokenizer,
        scheduler=EulerDiscreteScheduler(**BETAS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def run(request: Txt2Img, models: weights.Models) -> tuple[list[int], np.ndarray]:
    """Progress and pixels."""
    steps = txt2img.generate(request, models)
    progress = []
    with torch.inference_mode():
        while True:
            try:
                progress.append(next(steps))
            except StopIteration as end:
                return progress, np.stack(end.value)


@pytest.mark.parametrize(
    ("sampler", "schedule", "scheduler"),
    [
        ("Euler", "", (EulerDiscreteScheduler, {"timestep_spacing": "linspace"})),
        ("Euler a", "", (EulerAncestralDiscreteScheduler, {"timestep_spacing": "linspace"})),
        ("DPM++ 2M Karras", "", (DPMSolverMultistepScheduler, {"use_karras_sigmas": True})),
        ("DPM++ 2M", "Karras", (DPMSolverMultistepScheduler, {"use_karras_sigmas": True})),
        ("DPM++ 2M", "Automatic", (DPMSolverMultistepScheduler, {"use_karras_sigmas": True})),
        ("DPM++ 2M", "", (DPMSolverMultistepScheduler, {})),
    ],
)
def test_latents_equal_those_of_the_diffusers_pipeline(
    pipeline: Any, models: weights.Models, sampler: str, schedule: str, scheduler: Any
) -> None:
    kind, options = scheduler
    pipeline.scheduler = kind(**BETAS, **options)
    expected = pipeline(
        [REQUEST.prompt] * 2,
        negative_prompt=[REQUEST.negative_prompt] * 2,
        num_inference_steps=REQUEST.steps,
        guidance_scale=REQUEST.cfg_scale,
        width=64,
        height=64,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
        output_type="latent",
    ).images
    request = replace(REQUEST, sampler_name=sampler, scheduler=schedule, batch_size=2)
    texts = [txt2img._encode(models, text, request) for text in (request.prompt, request.negative_prompt)]
    with torch.inference_mode():
        denoising = txt2img._Denoising(request, models, txt2img._repeated(*texts, 2), request.seed)
        for index in range(request.steps):
            denoising.step(index)
    assert (denoising.latents - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_pixels_equal_those_of_the_diffusers_pipeline(pipeline: Any, models: weights.Models) -> None:
    pipeline.scheduler = EulerDiscreteScheduler(**BETAS, timestep_spacing="linspace")
    expected = pipeline(
        REQUEST.prompt,
        negative_prompt=REQUEST.negative_prompt,
        num_inference_steps=4,
        guidance_scale=7.0,
        width=64,
        height=64,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images
    progress, pixels = run(REQUEST, models)
    assert progress == [1, 2, 3, 4]
    assert np.abs(pixels / 255 - expected).max() <= 0.5 / 255 + 1e-5
    assert pixels.std() > 0


def test_image_i_of_a_job_is_the_image_of_seed_plus_i_alone(models: weights.Models) -> None:
    progress, together = run(replace(REQUEST, batch_size=2, n_iter=2), models)
    assert progress[-1] == 16
    for index, pixels in enumerate(together):
        alone = run(replace(REQUEST, seed=REQUEST.seed + index), models)[1][0]
        assert np.abs(alone.astype(int) - pixels).max() <= 1


def test_without_guidance_the_negative_prompt_has_no_effect(models: weights.Models) -> None:
    one = run(replace(REQUEST, cfg_scale=1), models)[1]
    other = run(replace(REQUEST, cfg_scale=1, negative_prompt="something else"), models)[1]
    assert np.array_equal(one, other)


def test_nan_in_the_latents_fails_with_that_word(models: weights.Models, tiny_checkpoint: Path) -> None:
    broken = weights.load(as_cached(tiny_checkpoint), None, "cpu")
    broken.unet.conv_out.bias[0] = float("nan")
    with pytest.raises(JobError, match="NaN"):
        run(REQUEST, broken)


def test_the_tokenizer_gives_clips_own_numbers(models: weights.Models) -> None:
    tokens = models.text_encoders[0].tokenizer("a photo of a cat").input_ids
    assert tokens == [49406, 320, 1125, 539, 320, 2368, 49407]
