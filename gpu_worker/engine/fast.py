"""Other forms of networks, for speed alone: their blocks compiled, linear layers of the UNet's transformers in FP8.

They share the weights with the networks that they are made from, which stay for what wants to look inside (LoRA, bit
for bit repeats). A block is compiled at its first call, which takes seconds: whoever makes a form also calls it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import Linear, Module

# What is compiled as one, by the name of its class.
_REGIONS = ("BasicTransformerBlock", "ResnetBlock2D")
_FP8 = torch.float8_e4m3fn
_MAX_FP8 = torch.finfo(_FP8).max
# Code is compiled anew for each width and size of a block.
_MAX_COMPILED = 1024


class Fp8Linear(Module):
    """A linear layer whose weights and inputs are rounded to FP8 (e4m3; Micikevicius et al. 2022), each row by a scale
    of its own, and multiplied as such."""

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, of: Linear) -> None:
        super().__init__()
        self.bias = of.bias
        weight, scale = rounded(of.weight)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.view(1, -1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As Linear's, in the type of x, which is bf16: the only one that rows with scales come out in."""
        rows, scale = rounded(x.reshape(-1, x.shape[-1]))
        out = torch._scaled_mm(
            rows, self.weight.t(), scale, self.scale, self.bias, out_dtype=x.dtype, use_fast_accum=True
        )
        return out.view(*x.shape[:-1], -1)


def rounded(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in FP8, and for each row the factor that leads back."""
    scale = rows.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / _MAX_FP8
    return (rows / scale).clamp(-_MAX_FP8, _MAX_FP8).to(_FP8), scale


def unet_of(unet: Any, is_compiled: bool, is_fp8: bool) -> Any:
    """The other form of a UNet on its device. Compiled, it is so for any number of rows from 2 on."""
    twin = _twin(unet)
    if is_fp8:
        for block, name, layer in list(_layers_of_norms(twin)):
            setattr(block, name, Fp8Linear(layer))
    return compiled(twin) if is_compiled else twin


def vae_of(vae: Any) -> Any:
    """The other form of a VAE on its device: its decoder compiled, with weights of its own, as they lie in memory in
    another order."""
    twin = _twin(vae)
    twin.decoder = compiled(copy.deepcopy(vae.decoder).to(memory_format=torch.channels_last))
    return twin


def compiled(network: Any) -> Any:
    """The network, whose blocks are compiled from now on."""
    torch._dynamo.config.recompile_limit = _MAX_COMPILED
    torch._dynamo.config.accumulated_recompile_limit = _MAX_COMPILED
    for module in network.modules():
        if type(module).__name__ in _REGIONS:
            module.forward = _compiled(module.forward)
    return network


def _twin(network: Any) -> Any:
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    return copy.deepcopy(network, shared)


def _compiled(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    code = torch.compile(forward, fullgraph=True, dynamic=False)

    def call(*arguments: Any, **options: Any) -> torch.Tensor:
        for given in (*arguments, *options.values()):
            if isinstance(given, torch.Tensor):
                torch._dynamo.maybe_mark_dynamic(given, 0)
        return code(*arguments, **options)

    return call


def _layers_of_norms(unet: Module) -> Iterator[tuple[Module, str, Linear]]:
    """The linear layers of transformer blocks that read a layer norm, with which the rounding is one: where it is a
    pass over memory of its own, it takes longer than the product gains (on an H200, `tests/bench/gpu`)."""
    for name, module in unet.named_modules():
        if "transformer_blocks" in name:
            for child_name, child in module.named_children():
                reads_norm = child_name in {"to_q", "proj"} or (child_name in {"to_k", "to_v"} and ".attn1" in name)
                if isinstance(child, Linear) and reads_norm and not (child.in_features | child.out_features) % 16:
                    yield module, child_name, child
