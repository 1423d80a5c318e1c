"""Tiling against diffusers' pipeline with circular convolutions, in the company of jobs without it."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import Conv2d

from gpu_worker.models import lora, weights
from gpu_worker.models.adapters import Adapters
from gpu_worker.models.controlnet import ControlNet
from gpu_worker.pictures.hints import prepared
from gpu_worker.tasks import txt2img
from services.common.payloads.prompts import NetworkTag
from tests.gpu_worker import tiny_controlnet
from tests.gpu_worker.conftest import as_cached
from tests.gpu_worker.driving import assert_close, changed, crew, drive, latents, txt2img_of
from tests.gpu_worker.reference import pipeline_latents, pipeline_of, scheduler_of
from tests.gpu_worker.tiny_sdxl import make
from tests.pictures import encoded, noise

REQUEST = txt2img_of(prompt="a red circle", negative_prompt="bad", steps=3, width=64, height=64, seed=3, tiling=True)


@pytest.fixture(scope="module")
def models(tiny_checkpoint: Path) -> weights.Models:
    return weights.load(as_cached(tiny_checkpoint), None, "cpu")


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint: Path, models: weights.Models, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = pipeline_of(tiny_checkpoint, models.text_encoders[0].tokenizer, tmp_path_factory.mktemp("config"))
    return without_edges(made)


def without_edges(pipeline: Any) -> Any:
    """A copy whose convolutions are circular."""
    changed = copy.deepcopy(pipeline)
    for model in (changed.unet, changed.vae):
        for layer in model.modules():
            if isinstance(layer, Conv2d):
                layer.padding_mode = "circular"
    return changed


def test_jobs_with_it_and_without_have_each_the_latents_of_the_diffusers_pipeline(
    models: weights.Models, pipeline: Any
) -> None:
    requests = [
        changed(REQUEST, seed=seed, sampler_name=name) for seed, name in enumerate(("Euler", "Euler a", "DDIM"))
    ]
    plain = changed(REQUEST, tiling=False)
    tasks = [(i, latents(request, models)) for i, request in enumerate(requests)] + [(1, latents(plain, models))]
    found = drive(tasks)
    for request, latent in zip(requests, found, strict=False):
        assert_close(latent, pipeline_latents(pipeline, request.sampler_name, request))
    assert torch.equal(found[-1], drive([(0, latents(plain, models))])[0])


def test_pixels_have_no_edge_either(models: weights.Models, pipeline: Any) -> None:
    painters = crew(replace(models, tiling=True))
    found = drive([(0, txt2img.generate(REQUEST, prepared(REQUEST), painters, None, lambda _: None))])[0][0]
    pipeline.scheduler = scheduler_of("Euler", 0)
    expected = pipeline(
        REQUEST.prompt,
        negative_prompt=REQUEST.negative_prompt,
        num_inference_steps=3,
        guidance_scale=7.0,
        width=64,
        height=64,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images[0]
    assert np.abs(found / 255 - expected).max() <= 0.5 / 255 + 1e-5
    assert all(layer.padding_mode == "zeros" for layer in models.vae.modules() if isinstance(layer, Conv2d))


@pytest.mark.slow
def test_sdxl_tiles_too(tmp_path: Path) -> None:
    sdxl = make(tmp_path / "xl.safetensors")
    found = drive([(0, latents(REQUEST, sdxl.models))])[0]
    assert_close(found, pipeline_latents(without_edges(sdxl.pipeline), "Euler", REQUEST))


def test_a_network_of_convolutions_and_a_controlnet_go_around_the_edge(models: weights.Models, tmp_path: Path) -> None:
    """Where everything goes around, a picture from rolled noise and a rolled hint is the rolled picture."""
    layer = "lora_unet_down_blocks_0_resnets_0_conv1"
    state = {"lora_down.weight": torch.randn(4, 16, 3, 3), "lora_up.weight": torch.randn(16, 4, 1, 1)}
    save_file({f"{layer}.{part}": tensor for part, tensor in state.items()}, tmp_path / "x.safetensors")
    network = lora.load(as_cached(tmp_path / "x.safetensors", "Lora"), models, "tiny")
    net = ControlNet("net", tiny_controlnet.make(models.unet, 0))
    adapters = Adapters(((network, NetworkTag("x", 1, 0.3)),), {}, (net,))
    image = noise(128, 64)
    rolled = noise(128, 64)
    rolled.paste(image.crop((0, 0, 64, 64)), (64, 0))
    rolled.paste(image.crop((64, 0, 128, 64)), (0, 0))

    def first_prediction(picture: Any, shift: int) -> torch.Tensor:
        scripts = {"controlnet": {"args": [{"model": "net", "image": encoded(picture)}]}}
        request = txt2img_of(**changed(REQUEST, width=128).model_dump() | {"alwayson_scripts": scripts})
        running = latents(request, models, adapters)
        with torch.inference_mode():
            wish = next(running)
            moved = replace(wish, x=wish.x.roll(shift, 3))
            return drive([(0, asked(moved))])[0].roll(-shift, 3)

    assert_close(first_prediction(rolled, 8), first_prediction(image, 0))


def asked(wish: Any) -> Any:
    """A task that has one wish."""
    return (yield wish)
