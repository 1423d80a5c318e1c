"""Owns tiny ControlNets with random weights for a UNet, as diffusers' models and as files in either layout."""

from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from safetensors.torch import save_file

from gpu_worker.models import ldm


def make(unet: Any, seed: int, **config: Any) -> Any:
    """A ControlNet for the UNet. Those that are new begin with zeros, which say nothing; here they are random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: Any = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
        for module in (
            *made.controlnet_down_blocks,
            made.controlnet_mid_block,
            made.controlnet_cond_embedding.conv_out,
        ):
            torch.nn.init.normal_(module.weight, std=0.3)
    made.register_to_config(**config)
    return made.requires_grad_(False).eval()


def save(model: Any, path: Path, is_original: bool = True) -> Path:
    """As the original's files have it, or as diffusers' do."""
    state = original(model) if is_original else model.state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return path


def original(model: Any) -> dict[str, torch.Tensor]:
    """The weights by the original's names."""
    return {f"control_model.{_original(key, model.config)}": value for key, value in model.state_dict().items()}


def _original(name: str, config: Any) -> str:
    known: dict[str, str] = DIFFUSERS_TO_LDM_MAPPING["controlnet"]["layers"]
    if name in known:
        return known[name]
    if name.startswith("controlnet_down_blocks."):
        _, index, kind = name.split(".")
        return f"zero_convs.{index}.0.{kind}"
    if name.startswith("controlnet_mid_block."):
        return name.replace("controlnet_mid_block.", "middle_block_out.0.")
    if name.startswith("controlnet_cond_embedding.blocks."):
        *_, index, kind = name.split(".")
        return f"input_hint_block.{2 * int(index) + 2}.{kind}"
    return ldm.unet_name(name, config | {"up_block_types": []}).removeprefix(ldm.UNET)
