"""Which layers a network adds to, and what kohya calls them (sd-scripts, networks/lora.py; LyCORIS, config.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.nn import Conv2d, Linear, Module

from gpu_worker.models import ldm
from gpu_worker.models.weights import Models
from services.common.payloads.training import LORA_MODULE, Training

_ATTENTION, _CONVOLUTIONS = ("Transformer2DModel",), ("ResnetBlock2D", "Downsample2D", "Upsample2D")
_TEXT = ("CLIPAttention", "CLIPMLP")
# Layers outside of blocks that LyCORIS' presets name. kohya's SDXL has other names for them, so there they are left.
_SINGLE = ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")


@dataclass(frozen=True)
class _Choice:
    """Blocks of the UNet and of the text encoders whose layers are taken, single layers, and whether convolutions of
    more than one pixel are."""

    unet: tuple[str, ...]
    texts: tuple[str, ...] = _TEXT
    single: tuple[str, ...] = ()
    convolutions: bool = True


PRESETS = {
    "full": _Choice(_ATTENTION + _CONVOLUTIONS, single=_SINGLE),
    "full-lin": _Choice((*_ATTENTION, "ResnetBlock2D"), single=_SINGLE[2:], convolutions=False),
    "attn-mlp": _Choice(_ATTENTION, convolutions=False),
    "attn-only": _Choice(("Attention",), ("CLIPAttention",), convolutions=False),
    "unet-only": _Choice(_ATTENTION + _CONVOLUTIONS, (), _SINGLE),
    "unet-transformer-only": _Choice(_ATTENTION, (), convolutions=False),
    "unet-convblock-only": _Choice(_CONVOLUTIONS, (), _SINGLE[:2]),
}


@dataclass(frozen=True)
class Layer:
    """A layer that is trained: its name in its model, kohya's name, and the rank and alpha of what is added."""

    name: str
    kohya: str
    module: Module
    rank: int
    alpha: float


def unet_layers(models: Models, config: Training) -> list[Layer]:
    """Those of the UNet; none where it is not trained."""
    if not config.trains_unet:
        return []
    choice, unet_config = _choice(config), models.unet.config
    single = () if models.is_sdxl else choice.single

    def kohya(name: str) -> str:
        if models.is_sdxl:
            name = ldm.unet_name(f"{name}.weight", unet_config).removeprefix(ldm.UNET).removesuffix(".weight")
        return "lora_unet_" + name.replace(".", "_")

    found = _layers(models.unet, choice.unet, single, choice.convolutions)
    return [_layer(config, name, kohya(name), module) for name, module in found]


def text_layers(models: Models, config: Training) -> list[list[Layer]]:
    """Those of each text encoder."""
    tables = []
    for index, encoder in enumerate(models.text_encoders):
        prefix = f"lora_te{index + 1}_" if models.is_sdxl else "lora_te_"
        containers = _choice(config).texts if config.trains_text else ()
        tables.append(
            [
                _layer(config, name, f"{prefix}text_model_{name.removeprefix('text_model.').replace('.', '_')}", module)
                for name, module in _layers(encoder.model, containers, (), convolutions=False)
            ]
        )
    return tables


def _choice(config: Training) -> _Choice:
    if config.network_module == LORA_MODULE:
        # sd-scripts looks into the convolutional blocks only where convolutions have a rank.
        return PRESETS["attn-mlp"] if "conv_dim" not in config.network_args else _Choice(_ATTENTION + _CONVOLUTIONS)
    return PRESETS[config.network_args.get("preset", "full")]


def _layers(
    model: Any, containers: tuple[str, ...], single: tuple[str, ...], convolutions: bool
) -> Iterator[tuple[str, Module]]:
    """The matrices and convolutions inside of blocks of these classes, and the single ones, in the model's order."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if type(module).__name__ in containers:
            inside = (*inside, f"{name}.")
        is_taken = name in single or name.startswith(inside)
        if is_taken and (isinstance(module, Linear) or (isinstance(module, Conv2d) and _fits(module, convolutions))):
            yield name, module


def _fits(module: Conv2d, convolutions: bool) -> bool:
    return convolutions or module.kernel_size == (1, 1)


def _layer(config: Training, name: str, kohya: str, module: Module) -> Layer:
    """A convolution of more than one pixel has a rank and an alpha of its own."""
    rank, alpha = config.network_dim, config.network_alpha
    if isinstance(module, Conv2d) and module.kernel_size != (1, 1):
        arguments = config.network_args
        rank = int(float(arguments.get("conv_dim", rank)))
        alpha = float(arguments.get("conv_alpha", 1.0 if config.network_module == LORA_MODULE else alpha))
    return Layer(name, kohya, module, rank, alpha or rank)
