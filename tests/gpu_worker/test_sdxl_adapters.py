"""Networks and embeddings for SDXL: LoRA files of every kind in the original layout's names, for both text encoders."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gpu_worker.job import JobError
from gpu_worker.models import embeddings, lora, prompt, weights
from gpu_worker.models.adapters import Adapters
from services.common.payloads.prompts import NetworkTag
from tests.gpu_worker.conftest import as_cached
from tests.gpu_worker.driving import assert_close, changed, drive, latents, txt2img_of
from tests.gpu_worker.models.test_lora import parts
from tests.gpu_worker.reference import pipeline_latents
from tests.gpu_worker.tiny_sdxl import TinySdxl, make

pytestmark = pytest.mark.slow

REQUEST = txt2img_of(prompt="a red circle", steps=2, width=64, height=64, seed=3)
LAYERS = {
    # Diffusers' names, and those of kohya's files for SDXL: the original layout's.
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    ),
    "down_blocks.0.resnets.0.conv1": "lora_unet_input_blocks_1_0_in_layers_2",
    "mid_block.attentions.0.proj_in": "lora_unet_middle_block_1_proj_in",
}
TEXTS = {
    "text_encoder": ("encoder.layers.0.self_attn.q_proj", "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"),
    "text_encoder_2": ("text_model.encoder.layers.1.mlp.fc1", "lora_te2_text_model_encoder_layers_1_mlp_fc1"),
}


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> TinySdxl:
    return make(tmp_path_factory.mktemp("sdxl") / "tiny-xl.safetensors")


def with_network(
    sdxl: TinySdxl, path: Path, seed: int, use: NetworkTag, kinds: tuple[str, ...]
) -> tuple[lora.Network, Any]:
    """A file for all parts of the checkpoint, each layer's of the next kind, and diffusers' pipeline with its changes
    in its weights."""
    merged = copy.deepcopy(sdxl.pipeline)
    places = [(merged.unet, name, known, use.unet_scale) for name, known in LAYERS.items()]
    places += [(getattr(merged, part), name, known, use.text_scale) for part, (name, known) in TEXTS.items()]
    state = {}
    for index, (model, name, known, scale) in enumerate(places):
        weight = model.get_submodule(name).weight
        tensors, change = parts(kinds[index % len(kinds)], weight.shape, seed + 10 * index)
        state |= {f"{known}.{part}": tensor for part, tensor in tensors.items()}
        weight.data += scale * change
    save_file(state, path)
    return lora.load(as_cached(path, "Lora"), sdxl.models, "tiny-xl"), merged


def test_jobs_with_different_networks_equal_each_the_pipeline_with_its_merge(sdxl: TinySdxl, tmp_path: Path) -> None:
    uses = [NetworkTag("0", 0.8, 0.6), NetworkTag("1", 0.0, 1.0), NetworkTag("2", 0.7, -0.4)]
    kinds = [("lora",), ("loha", "lokr"), ("lokr", "full lokr", "loha")]
    found = [
        with_network(sdxl, tmp_path / f"{use.name}.safetensors", 100 * index, use, kinds[index])
        for index, use in enumerate(uses)
    ]
    requests = [changed(REQUEST, seed=seed, cfg_scale=(7, 1, 4, 2)[seed], batch_size=1) for seed in range(4)]
    adapters = [Adapters(((network, use),)) for (network, _), use in zip(found, uses, strict=True)]
    tasks = [
        (i, latents(r, sdxl.models, a)) for i, (r, a) in enumerate(zip(requests, [*adapters, Adapters()], strict=True))
    ]
    pipelines = [merged for _, merged in found] + [sdxl.pipeline]
    for request, made, pipeline in zip(requests, drive(tasks, max_rows=4), pipelines, strict=True):
        assert_close(made, pipeline_latents(pipeline, request.sampler_name, request))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", (32, 32)),
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", (320, 768)),
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k", (1280, 768)),
    ],
)
def test_a_lora_of_sd15_is_refused_by_name(sdxl: TinySdxl, tmp_path: Path, layer: str, shape: tuple[int, int]) -> None:
    tensors, _ = parts("lora", torch.Size(shape), 0)
    path = tmp_path / "old.safetensors"
    save_file({f"{layer}.{part}": tensor for part, tensor in tensors.items()}, path)
    with pytest.raises(JobError) as refused:
        lora.load(as_cached(path, "Lora"), sdxl.models, "tiny-xl")
    assert str(refused.value).startswith("old.safetensors is a LoRA for another architecture than tiny-xl")
    assert layer in str(refused.value)


def test_an_embedding_stands_for_vectors_of_both_text_encoders(sdxl: TinySdxl, tmp_path: Path) -> None:
    models: weights.Models = sdxl.models
    tokens = models.text_encoders[0].tokenizer("green fox", add_special_tokens=False).input_ids
    vectors = [encoder.model.get_input_embeddings().weight[tokens].clone() for encoder in models.text_encoders]
    save_file(dict(zip(("clip_l", "clip_g"), vectors, strict=True)), tmp_path / "amypt.safetensors")
    found = embeddings.load(as_cached(tmp_path / "amypt.safetensors", "embeddings"), models, "tiny-xl")
    with torch.inference_mode():
        one = prompt.encode(models, "a (amypt:1.2), cat", 1, Adapters((), {"amypt": found}))
        other = prompt.encode(models, "a (green fox:1.2), cat", 1)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
