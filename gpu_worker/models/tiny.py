"""Writes a tiny Stable Diffusion 1.5 checkpoint with random weights: everything but pictures works with it.

    python -m gpu_worker.models.tiny OUT.safetensors [--seed N]

It has the original single-file layout in fp16, and its configuration in the metadata, as weights.py reads it.
"""

from __future__ import annotations

import argparse
import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from gpu_worker.models import ldm

_TEXT_WIDTH = 32  # the vocabulary's 49,408 rows of this width are most of the file
_TINY = {
    "unet": {
        "sample_size": 8,
        "cross_attention_dim": _TEXT_WIDTH,
        "attention_head_dim": 4,
        "block_out_channels": [16, 32, 32, 32],
        "layers_per_block": 1,
        "norm_num_groups": 8,
    },
    "vae": {"sample_size": 64, "block_out_channels": [16, 16, 32, 32], "layers_per_block": 1, "norm_num_groups": 8},
    "text_encoder": {
        "hidden_size": _TEXT_WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "projection_dim": _TEXT_WIDTH,
    },
    "scheduler": {},
}


def config() -> dict[str, dict[str, Any]]:
    """The tiny model's configuration: SD1.5's, smaller."""
    full = json.loads((resources.files("gpu_worker") / "configs" / "sd15.json").read_text())
    return {part: full[part] | smaller for part, smaller in _TINY.items()}


def weights(seed: int) -> dict[str, torch.Tensor]:
    """Random weights in the original layout, fp16; the same for the same seed."""
    parts = config()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(**parts["unet"])
        vae = AutoencoderKL(**parts["vae"])
        clip = CLIPTextModel(CLIPTextConfig(**parts["text_encoder"]))
    # Texts as the UNet reads them have a mean that is not 0, which weights in prompts keep.
    torch.nn.init.constant_(clip.final_layer_norm.bias, 0.1)
    return ldm.checkpoint(parts, unet, vae, clip)


def write(path: Path, seed: int = 0) -> None:
    """Writes the checkpoint, a few MB, the same bytes for the same seed: safetensors writes metadata in any order, so
    there is one entry only."""
    save_file(weights(seed), path, metadata={"esd_config": json.dumps(config())})


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write(arguments.out, arguments.seed)
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
