"""Owns a LoRA with random weights for the tiny checkpoint, as kohya's files have it."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from gpu_worker.models import tiny

# By its names for layers, and those of the original layout.
_LAYERS = {
    "lora_unet_mid_block_attentions_0_proj_in": "model.diffusion_model.middle_block.1.proj_in",
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (
        "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj"
    ),
}
_WIDTH, _RANK = 32, 2


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    """A layer of the UNet and one of the text encoder."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layer in _LAYERS:
        found[f"{layer}.lora_down.weight"] = torch.randn(_RANK, _WIDTH, generator=generator)
        found[f"{layer}.lora_up.weight"] = torch.randn(_WIDTH, _RANK, generator=generator)
    return found


def write(path: Path, seed: int = 0) -> None:
    """Writes the file."""
    save_file(state(seed), path)


def merge(checkpoint: Path, path: Path, seed: int = 0) -> None:
    """Writes a tiny checkpoint with the LoRA in its weights."""
    lora, merged = state(seed), load_file(checkpoint)
    for layer, original in _LAYERS.items():
        weight = merged[f"{original}.weight"].float()
        change = lora[f"{layer}.lora_up.weight"] @ lora[f"{layer}.lora_down.weight"]
        merged[f"{original}.weight"] = weight + change.reshape(weight.shape)
    save_file(merged, path, metadata={"esd_config": json.dumps(tiny.config())})
