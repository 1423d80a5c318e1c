"""SDXL: a tiny checkpoint in Stability's layout against diffusers' own pipeline."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from gpu_worker import ldm, prompt, weights
from gpu_worker.canvas import prepared
from gpu_worker.tasks import img2img, stages, txt2img
from services.common.payloads import Img2Img, check
from tests.gpu_worker.conftest import as_cached
from tests.gpu_worker.driving import NO_ADAPTERS, assert_close, changed, drive, latents, txt2img_of
from tests.gpu_worker.reference import pipeline_latents, scheduler_of
from tests.pictures import encoded, noise

BIG_G = "conditioner.embedders.1.model."
TINY: dict[str, dict[str, Any]] = {
    "unet": {
        "sample_size": 8,
        "cross_attention_dim": 32 + 48,
        "attention_head_dim": [2, 4, 4],
        "block_out_channels": [16, 32, 32],
        "norm_num_groups": 8,
        "transformer_layers_per_block": [1, 1, 2],
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 48 + 6 * 8,
    },
    "vae": {"block_out_channels": [16, 16, 32, 32], "layers_per_block": 1, "norm_num_groups": 8},
    "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "text_encoder_2": {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "projection_dim": 48,
    },
    "scheduler": {},
}


def open_clip(model: CLIPTextModelWithProjection) -> dict[str, torch.Tensor]:
    """The model's weights as open_clip names them: q, k and v in one matrix."""
    state = {key: value for key, value in model.state_dict().items() if "position_ids" not in key}
    found = {}
    for ours, theirs in DIFFUSERS_TO_LDM_MAPPING["openclip"]["layers"].items():
        if ours in state:
            tensor = state.pop(ours)
            found[BIG_G + theirs] = tensor.T if theirs.endswith("text_projection") else tensor
    for key in [key for key in state if ".q_proj." in key]:
        stem, kind = key.split(".q_proj.")
        joined = torch.cat([state.pop(f"{stem}.{part}_proj.{kind}") for part in "qkv"])
        state[f"{stem}.in_proj_{kind}"] = joined
    for key, tensor in state.items():
        name = key
        for new, old in DIFFUSERS_TO_LDM_MAPPING["openclip"]["transformer"].items():
            name = name.replace(new, old)
        found[f"{BIG_G}transformer.{name}"] = tensor
    return found


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    full = weights._family_config("sdxl")
    config = {part: full[part] | smaller for part, smaller in TINY.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {
            "config": config,
            "unet": UNet2DConditionModel(**config["unet"]).eval(),
            "vae": AutoencoderKL(**config["vae"]).eval(),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**config["text_encoder"])).eval(),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**config["text_encoder_2"])).eval(),
        }


@pytest.fixture(scope="module")
def checkpoint(parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = parts["config"]
    state = {ldm.unet_name(key, config["unet"]): value for key, value in parts["unet"].state_dict().items()}
    state |= {ldm.vae_name(key, config["vae"]): value for key, value in parts["vae"].state_dict().items()}
    prefix = "conditioner.embedders.0.transformer.text_model."
    state |= {prefix + key: value for key, value in parts["text_encoder"].state_dict().items()}
    state |= open_clip(parts["text_encoder_2"])
    path = tmp_path_factory.mktemp("sdxl") / "tiny-xl.safetensors"
    save_file(
        {key: value.contiguous() for key, value in state.items()}, path, metadata={"esd_config": json.dumps(config)}
    )
    return path


@pytest.fixture(scope="module")
def models(checkpoint: Path) -> weights.Models:
    return weights.load(as_cached(checkpoint), None, "cpu")


@pytest.fixture(scope="module")
def pipeline(parts: dict[str, Any], models: weights.Models) -> Any:
    made = StableDiffusionXLPipeline(
        vae=parts["vae"],
        unet=parts["unet"],
        text_encoder=parts["text_encoder"],
        text_encoder_2=parts["text_encoder_2"],
        tokenizer=models.text_encoders[0].tokenizer,
        tokenizer_2=models.text_encoders[1].tokenizer,
        scheduler=scheduler_of("Euler", 0),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


REQUEST = txt2img_of(prompt="a red circle", steps=3, width=64, height=64, seed=3, batch_size=2)


def test_pixels_equal_those_of_the_diffusers_pipeline(models: weights.Models, pipeline: Any) -> None:
    assert models.is_sdxl
    pipeline.scheduler = scheduler_of("Euler", 0)
    expected = pipeline(
        [REQUEST.prompt] * 2,
        negative_prompt=[""] * 2,
        num_inference_steps=3,
        guidance_scale=7.0,
        width=64,
        height=64,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
        output_type="np",
    ).images
    pixels = np.stack(drive(models.unet, [(0, txt2img.generate(REQUEST, models, NO_ADAPTERS, lambda _: None))])[0])
    assert np.abs(pixels / 255 - expected).max() <= 0.5 / 255 + 1e-5


def test_a_job_in_company_has_the_latents_of_the_diffusers_pipeline(models: weights.Models, pipeline: Any) -> None:
    names = ("Euler", "DPM++ 2M Karras", "Heun", "Euler a", "DDIM", "DPM++ SDE Karras")
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
    for request, found in zip(requests, drive(models.unet, tasks, max_rows=5), strict=True):
        assert_close(found, pipeline_latents(pipeline, request.sampler_name, request))


def test_img2img_has_the_latents_of_the_diffusers_pipeline(models: weights.Models, pipeline: Any) -> None:
    fields = {"prompt": "a red circle", "steps": 6, "width": 64, "height": 64, "seed": 3, "denoising_strength": 0.5}
    request = check("img2img", fields | {"init_images": [encoded(noise())]}, "job")
    assert isinstance(request, Img2Img)
    with torch.inference_mode():
        canvas = prepared(request)
        originals = img2img.encoded(request, canvas, models)
        texts = stages.guidance(models, request, NO_ADAPTERS)
    task = img2img.denoised(request, canvas, models, originals, texts, 0, lambda _: None)
    reference = StableDiffusionXLImg2ImgPipeline(
        **{name: part for name, part in pipeline.components.items() if name not in {"image_encoder"}},
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    reference.scheduler = scheduler_of("Euler", 0)
    reference.set_progress_bar_config(disable=True)
    expected = reference(
        request.prompt,
        negative_prompt="",
        image=originals.clone(),
        strength=4.5 / 6,
        num_inference_steps=6,
        guidance_scale=7.0,
        original_size=(64, 64),
        target_size=(64, 64),
        generator=[torch.Generator().manual_seed(3)],
        output_type="latent",
    ).images
    assert_close(drive(models.unet, [(0, task)])[0], expected)


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
