"""How large the demo model is: SD1.5's layout with a UNet of two levels, 64 and 128 channels; 8.5 million weights.

Norms have groups of 8 channels and more: with 32 groups as in the full size, a group would be a channel or two, and
normalising those takes away what a flat colour is.
"""

from __future__ import annotations

from typing import Any

from gpu_worker.models.weights import family_config

_TEXT_WIDTH = 64  # the vocabulary's 49,408 rows of this width are more than a third of all weights
_SMALLER: dict[str, dict[str, Any]] = {
    "unet": {
        "sample_size": 8,
        "cross_attention_dim": _TEXT_WIDTH,
        "attention_head_dim": 4,  # the number of heads, as in SD1.5
        "block_out_channels": [64, 128],
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 8,
    },
    "vae": {"sample_size": 64, "block_out_channels": [32, 32, 64, 64], "layers_per_block": 1, "norm_num_groups": 4},
    "text_encoder": {
        "hidden_size": _TEXT_WIDTH,
        "intermediate_size": 4 * _TEXT_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "projection_dim": _TEXT_WIDTH,
    },
    "scheduler": {},
}


def config() -> dict[str, dict[str, Any]]:
    """The parts' configurations, as a checkpoint's metadata carries them."""
    full = family_config("sd15")
    return {part: full[part] | smaller for part, smaller in _SMALLER.items()}
