"""Owns a LoRA with random weights for the tiny checkpoint, as kohya's files have it."""

from pathlib import Path

import torch
from safetensors.torch import save_file

_LAYERS = (
    "lora_unet_mid_block_attentions_0_proj_in",
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
)
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
