"""What a model is, by names and shapes such as those that files of each kind have."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from services.models.inspection import inspect
from services.models.recognition import recognise
from tests.services.models.files import safetensors

FIRST = "model.diffusion_model.input_blocks.0.0.weight"
ATTENTION = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
DOWN = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"


@pytest.mark.parametrize(
    ("shapes", "kind", "architecture"),
    [
        ({FIRST: [320, 4, 3, 3], "cond_stage_model.transformer.x": [1]}, "checkpoint", "sd_1_5"),
        ({FIRST: [320, 9, 3, 3], "cond_stage_model.transformer.x": [1]}, "inpaint", "sd_1_5"),
        ({FIRST: [320, 8, 3, 3], "cond_stage_model.transformer.x": [1]}, "instruct_pix2pix", "sd_1_5"),
        ({FIRST: [320, 9, 3, 3], "conditioner.embedders.0.x": [1]}, "inpaint", "sd_xl"),
        ({FIRST: [320, 4, 3, 3], "cond_stage_model.model.x": [1]}, "checkpoint", "sd_2"),
        ({FIRST: [320, 4, 3, 3], f"model.diffusion_model.{ATTENTION}": [320, 768]}, "checkpoint", "sd_1_5"),
        ({FIRST: [], "conditioner.embedders.0.x": []}, "checkpoint", "sd_xl"),
        ({"first_stage_model.encoder.down.0.x": [1]}, "vae", "unknown"),
        ({"encoder.down.0.block.0.conv1.weight": [1], "decoder.up.0.x": [1]}, "vae", "unknown"),
        ({f"control_model.{ATTENTION}": [320, 768]}, "controlnet", "sd_1_5"),
        ({"input_hint_block.0.weight": [16, 3, 3, 3], ATTENTION: [640, 2048]}, "controlnet", "sd_xl"),
        ({DOWN: [4, 768], "lora_te_text_model_x.lora_down.weight": [4, 768]}, "lora", "sd_1_5"),
        ({DOWN: [4, 768]}, "lora", "sd_1_5"),
        ({DOWN: [4, 2048]}, "lora", "sd_xl"),
        ({"lora_te1_x.lora_down.weight": [4, 768]}, "lora", "sd_xl"),
        ({DOWN: [4, 768], "lora_unet_conv_in.lora_down.weight": [4, 4, 3, 3]}, "locon", "sd_1_5"),
        ({DOWN: [4, 768], "lora_unet_conv_in.lora_mid.weight": [4, 4, 3, 3]}, "locon", "sd_1_5"),
        (
            {"lora_unet_x_attn2_to_k.hada_w1_a": [320, 4], "lora_unet_x_attn2_to_k.hada_w1_b": [4, 768]},
            "loha",
            "sd_1_5",
        ),
        ({"lycoris_x.lokr_w1": [4, 4]}, "lokr", "unknown"),
        ({DOWN: [4, 768], "lora_unet_x.dora_scale": [1, 4]}, "dora", "sd_1_5"),
        ({"lora_unet_x.diff": [4, 4]}, "diff", "unknown"),
        ({"unet.x.attn2.to_k.lora_A.weight": [4, 768]}, "lora", "unknown"),
        ({"emb_params": [8, 768]}, "embedding", "sd_1_5"),
        ({"emb_params": [8, 1024]}, "embedding", "sd_2"),
        ({"clip_g": [8, 1280], "clip_l": [8, 768]}, "embedding", "sd_xl"),
        ({"string_to_token": [], "string_to_param": []}, "embedding", "unknown"),
        ({"layer_structure": [], "linear.0.weight": []}, "hypernetwork", "unknown"),
        ({"a": [1]}, "unknown", "unknown"),
        ({FIRST: [320]}, "checkpoint", "unknown"),
        ({}, "unknown", "unknown"),
    ],
)
def test_a_model_is_known_by_its_tensors(shapes: dict[str, Sequence[int]], kind: str, architecture: str) -> None:
    assert recognise(shapes) == (kind, architecture)


def test_inspection_tells_the_kind_of_a_file() -> None:
    content = safetensors(768, name="emb_params", shape=[1, 768])
    found = inspect("a.safetensors", len(content), lambda first, last: content[first : last + 1])
    assert (found.format, found.kind, found.architecture) == ("safetensors", "embedding", "sd_1_5")
