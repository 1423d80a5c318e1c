"""Weights in the original single-file (LDM) layout, and their names there, from diffusers' models.

The other way is diffusers' own converter (loaders/single_file_utils.py); tests hold the two against each other.
"""

from __future__ import annotations

import re
from typing import Any

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "cond_stage_model.transformer."

_UNET_TOP = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
}
_UNET_RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
_VAE_ATTENTION = {"group_norm.": "norm.", "to_q.": "q.", "to_k.": "k.", "to_v.": "v.", "to_out.0.": "proj_out."}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MID = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def checkpoint(config: dict[str, Any], unet: Any, vae: Any, text_encoder: Any) -> dict[str, Any]:
    """The weights of a Stable Diffusion 1.5, whatever its size, as its single file has them: fp16."""
    named = {unet_name(name, config["unet"]): tensor for name, tensor in unet.state_dict().items()}
    for name, tensor in vae.state_dict().items():
        original = vae_name(name, config["vae"])
        named[original] = tensor[:, :, None, None] if is_vae_attention_matrix(original) else tensor
    named |= {clip_name(name): tensor for name, tensor in text_encoder.state_dict().items()}
    return {name: tensor.half().cpu().contiguous() for name, tensor in named.items()}


def unet_name(name: str, config: dict[str, Any]) -> str:
    """A UNet weight's original name. `config` is the UNet's, of which the blocks' sizes and types are used."""
    if match := _BLOCK.fullmatch(name):
        direction, block, part, layer, rest = match.groups()
        per_block = config["layers_per_block"] + 1
        first = int(block) * per_block
        if part == "downsamplers":
            return f"{UNET}input_blocks.{first + per_block}.0.op.{rest.removeprefix('conv.')}"
        if part == "upsamplers":
            position = 2 if "CrossAttn" in config["up_block_types"][int(block)] else 1
            return f"{UNET}output_blocks.{first + per_block - 1}.{position}.{rest}"
        side = (
            f"input_blocks.{1 + first + int(layer)}" if direction == "down" else f"output_blocks.{first + int(layer)}"
        )
        return f"{UNET}{side}.{_layer(part, rest)}"
    if match := _MID.fullmatch(name):
        part, layer, rest = match.groups()
        if part == "attentions":
            return f"{UNET}middle_block.1.{rest}"
        return f"{UNET}middle_block.{2 * int(layer)}.{_renamed(rest, _UNET_RESNET)}"
    return UNET + _renamed(name, _UNET_TOP)


def vae_name(name: str, config: dict[str, Any]) -> str:
    """A VAE weight's original name."""
    side, _, inner = name.partition(".")
    if match := _BLOCK.fullmatch(inner):
        direction, block, part, layer, rest = match.groups()
        # The decoder counts its blocks from the picture upwards.
        index = int(block) if direction == "down" else len(config["up_block_types"]) - 1 - int(block)
        if part == "resnets":
            rest = rest.replace("conv_shortcut", "nin_shortcut")
            return f"{VAE}{side}.{direction}.{index}.block.{layer}.{rest}"
        return f"{VAE}{side}.{direction}.{index}.{direction}sample.{rest}"
    if match := _MID.fullmatch(inner):
        part, layer, rest = match.groups()
        if part == "attentions":
            return f"{VAE}{side}.mid.attn_1.{_renamed(rest, _VAE_ATTENTION)}"
        return f"{VAE}{side}.mid.block_{int(layer) + 1}.{rest}"
    return VAE + name.replace("conv_norm_out", "norm_out")


def clip_name(name: str) -> str:
    """A CLIP text weight's original name (SD1.5)."""
    return f"{CLIP}text_model.{name.removeprefix('text_model.')}"


def is_vae_attention_matrix(name: str) -> bool:
    """Whether the original layout keeps this VAE weight as a 1x1 convolution."""
    return ".mid.attn_1." in name and name.endswith(".weight") and ".norm." not in name


def _layer(part: str, rest: str) -> str:
    return f"0.{_renamed(rest, _UNET_RESNET)}" if part == "resnets" else f"1.{rest}"


def _renamed(name: str, table: dict[str, str]) -> str:
    for ours, theirs in table.items():
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    return name
