"""Every key of a full-size network is one that kohya would write, and none is missing."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from gpu_worker.models import weights
from gpu_worker.trainer import networks
from gpu_worker.trainer.layers import PRESETS, Layer, text_layers, unet_layers
from services.common.payloads import network_args
from services.common.payloads.training import check_training
from tests.gpu_worker.conftest import as_cached

ATTENTION = [f"attn{i}_to_{part}" for i in (1, 2) for part in ("q", "k", "v", "out_0")]
BLOCK = [*ATTENTION, "ff_net_0_proj", "ff_net_2"]
TEXT = [*(f"self_attn_{part}_proj" for part in ("k", "v", "q", "out")), "mlp_fc1", "mlp_fc2"]


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def models(request: Any) -> Any:
    """The full-size models without their weights."""
    config = weights.family_config(request.param)
    with weights.Empty():
        unet = UNet2DConditionModel(**config["unet"])
        encoders = [CLIPTextModel(CLIPTextConfig(**config["text_encoder"]))]
        if request.param == "sdxl":
            encoders.append(CLIPTextModelWithProjection(CLIPTextConfig(**config["text_encoder_2"])))
    return weights.Models(
        unet=unet,
        vae=None,
        text_encoders=tuple(weights.TextEncoder(None, encoder) for encoder in encoders),
        scheduler_config={},
        device=torch.device("meta"),
        dtype=torch.float32,
    )


@pytest.fixture(scope="module")
def tiny_models(tiny_checkpoint: Path) -> weights.Models:
    return weights.load(as_cached(tiny_checkpoint), None, "cpu")


def transformer(depth: int) -> list[str]:
    """The layers of an attention block, as published."""
    return ["proj_in", "proj_out", *(f"transformer_blocks_{i}_{layer}" for i in range(depth) for layer in BLOCK)]


def sd15_attentions() -> Iterator[str]:
    """sd-scripts has diffusers' names for SD1.5: two attentions in three blocks down, one in the middle, three in
    three blocks up."""
    places = [f"down_blocks_{block}_attentions_{i}" for block in range(3) for i in range(2)]
    places += ["mid_block_attentions_0"]
    places += [f"up_blocks_{block}_attentions_{i}" for block in range(1, 4) for i in range(3)]
    yield from (f"lora_unet_{place}_{layer}" for place in places for layer in transformer(1))


def sd15_convolutions() -> Iterator[str]:
    resnets = [(f"down_blocks_{block}_resnets_{i}", block in {1, 2} and i == 0) for block in range(4) for i in range(2)]
    resnets += [(f"mid_block_resnets_{i}", False) for i in range(2)]
    resnets += [(f"up_blocks_{block}_resnets_{i}", True) for block in range(4) for i in range(3)]
    for place, has_shortcut in resnets:
        layers = ["conv1", "time_emb_proj", "conv2", *(["conv_shortcut"] if has_shortcut else [])]
        yield from (f"lora_unet_{place}_{layer}" for layer in layers)
    yield from (f"lora_unet_down_blocks_{block}_downsamplers_0_conv" for block in range(3))
    yield from (f"lora_unet_up_blocks_{block}_upsamplers_0_conv" for block in range(3))


def sdxl_attentions() -> Iterator[str]:
    """Stability's names: depth 2 at half, 10 at a quarter of the size."""
    places = {f"input_blocks_{i}_1": depth for i, depth in {4: 2, 5: 2, 7: 10, 8: 10}.items()}
    places |= {"middle_block_1": 10}
    places |= {f"output_blocks_{i}_1": depth for i, depth in {0: 10, 1: 10, 2: 10, 3: 2, 4: 2, 5: 2}.items()}
    yield from (f"lora_unet_{place}_{layer}" for place, depth in places.items() for layer in transformer(depth))


def sdxl_convolutions() -> Iterator[str]:
    resnets = [(f"input_blocks_{i}_0", i in {4, 7}) for i in (1, 2, 4, 5, 7, 8)]
    resnets += [(f"middle_block_{i}", False) for i in (0, 2)] + [(f"output_blocks_{i}_0", True) for i in range(9)]
    for place, has_shortcut in resnets:
        layers = ["in_layers_2", "emb_layers_1", "out_layers_3", *(["skip_connection"] if has_shortcut else [])]
        yield from (f"lora_unet_{place}_{layer}" for layer in layers)
    yield from (f"lora_unet_{place}" for place in ("input_blocks_3_0_op", "input_blocks_6_0_op"))
    yield from (f"lora_unet_{place}_conv" for place in ("output_blocks_2_2", "output_blocks_5_2"))


def text_keys(prefix: str, num_layers: int) -> list[str]:
    return [f"{prefix}_text_model_encoder_layers_{i}_{layer}" for i in range(num_layers) for layer in TEXT]


def keys(layers: list[Layer]) -> list[str]:
    return sorted(layer.kohya for layer in layers)


def test_a_plain_lora_has_kohyas_layers(models: Any) -> None:
    config = check_training({})
    expected = sorted(sdxl_attentions() if models.is_sdxl else sd15_attentions())
    assert keys(unet_layers(models, config)) == expected
    assert len(expected) == (722 if models.is_sdxl else 192)  # as sd-scripts logs
    texts = [keys(layers) for layers in text_layers(models, config)]
    if models.is_sdxl:
        assert texts == [sorted(text_keys("lora_te1", 12)), sorted(text_keys("lora_te2", 32))]
    else:
        assert texts == [sorted(text_keys("lora_te", 12))]


def test_a_locon_has_the_convolutions_too_with_their_own_rank_and_an_alpha_of_1(models: Any) -> None:
    config = check_training({"network_dim": 32, "network_alpha": 16, "network_args": ["conv_dim=8"]})
    found = unet_layers(models, config)
    all_keys = (
        [*sdxl_attentions(), *sdxl_convolutions()] if models.is_sdxl else [*sd15_attentions(), *sd15_convolutions()]
    )
    assert keys(found) == sorted(all_keys)
    assert len(found) == (788 if models.is_sdxl else 278)
    by_rank = {(layer.rank, layer.alpha) for layer in found}
    assert by_rank == {(32, 16.0), (8, 1.0)}
    assert {layer.rank for layer in found if layer.kohya.endswith(("_op", "conv1", "in_layers_2"))} == {8}
    assert {layer.rank for layer in found if layer.kohya.endswith(("time_emb_proj", "skip_connection"))} == {32}


# Shapes of weights of the published models, which kohya's files share: by names of layers, (outputs, inputs, kernel).
SHAPES = {
    "sd15": {
        "lora_unet_down_blocks_0_attentions_0_proj_in": (320, 320, 1, 1),
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (320, 768),
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj": (10240, 1280),
        "lora_unet_up_blocks_3_resnets_0_conv1": (320, 960, 3, 3),
        "lora_te_text_model_encoder_layers_11_mlp_fc1": (3072, 768),
    },
    "sdxl": {
        "lora_unet_input_blocks_4_1_proj_in": (640, 640),
        "lora_unet_middle_block_1_transformer_blocks_9_attn2_to_k": (1280, 2048),
        "lora_unet_output_blocks_8_0_in_layers_2": (320, 640, 3, 3),
        "lora_te1_text_model_encoder_layers_11_mlp_fc1": (3072, 768),
        "lora_te2_text_model_encoder_layers_31_self_attn_q_proj": (1280, 1280),
    },
}


@pytest.mark.slow
def test_a_file_has_two_factors_and_an_alpha_of_each_layer_and_nothing_else(models: Any) -> None:
    config = check_training({"network_dim": 32, "network_alpha": 16, "network_args": ["conv_dim=8"]})
    if models.is_sdxl:
        names = [*sdxl_attentions(), *sdxl_convolutions(), *text_keys("lora_te1", 12), *text_keys("lora_te2", 32)]
    else:
        names = [*sd15_attentions(), *sd15_convolutions(), *text_keys("lora_te", 12)]
    layers = [*unet_layers(models, config), *(layer for found in text_layers(models, config) for layer in found)]
    weights_of: dict[str, Any] = {layer.kohya: layer.module.weight for layer in layers}
    for name, shape in SHAPES["sdxl" if models.is_sdxl else "sd15"].items():
        assert weights_of[name].shape == shape
    expected: dict[str, tuple[int, ...]] = {}
    for name in names:
        outputs, inputs, *kernel = weights_of[name].shape
        rank = 8 if kernel == [3, 3] else 32
        expected[f"{name}.lora_down.weight"] = (rank, inputs, *kernel)
        expected[f"{name}.lora_up.weight"] = (outputs, rank, *(1 for _ in kernel))
        expected[f"{name}.alpha"] = ()
    tensors = networks.create(copy.deepcopy(models), config).tensors()
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected


def test_one_part_alone_may_be_trained(models: Any) -> None:
    assert not any(text_layers(models, check_training({"network_train_unet_only": True})))
    assert not unet_layers(models, check_training({"network_train_text_encoder_only": True}))


def test_an_alpha_of_0_is_the_rank(models: Any) -> None:
    assert {layer.alpha for layer in unet_layers(models, check_training({"network_alpha": 0}))} == {4}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_of_lycoris_choose_layers_as_it_does(tiny_models: Any, preset: str) -> None:
    from lycoris.kohya import LycorisNetworkKohya

    models = tiny_models
    config = check_training({"network_module": "lycoris.kohya", "network_args": [f"preset={preset}", "algo=loha"]})
    theirs = _lycoris_keys(LycorisNetworkKohya, models, preset)
    ours = unet_layers(models, config), text_layers(models, config)[0]
    assert (keys(ours[0]), keys(ours[1])) == theirs


def _lycoris_keys(network: Any, models: Any, preset: str) -> tuple[list[str], list[str]]:
    """The keys of LyCORIS' own network over the same models, wrapped and named as kohya has them."""
    from lycoris.config import PRESET

    wrapped = torch.nn.Module()
    wrapped.text_model = models.text_encoders[0].model
    rules = dict(PRESET[preset])
    # kohya calls one class otherwise than diffusers; another is there for a model that has two of that name.
    renamed = {"CrossAttention": "Attention", "TimestepEmbedding": "none"}
    rules["unet_target_module"] = [renamed.get(name, name) for name in rules["unet_target_module"]]
    network.apply_preset(rules)
    made = network(wrapped, models.unet, network_module="loha", conv_lora_dim=4, warn_on_unmatched=False)
    return (
        sorted(lora.lora_name for lora in made.unet_loras),
        sorted(lora.lora_name for lora in made.text_encoder_loras),
    )


def test_the_presets_of_the_configuration_are_those_of_the_trainer() -> None:
    assert tuple(PRESETS) == network_args.PRESETS
