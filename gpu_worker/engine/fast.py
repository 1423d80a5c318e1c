"""Another form of a UNet, for speed alone: its blocks compiled, the linear layers of its transformers in FP8.

It shares the weights with the UNet that it is made from, which stays for what wants to look inside (LoRA, bit for bit
repeats). It is only ever called while a CUDA graph is captured, so that compiling waits for nobody's step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import Linear, Module

_REGIONS = ("BasicTransformerBlock", "ResnetBlock2D")
_FP8 = torch.float8_e4m3fn
_MAX_FP8 = torch.finfo(_FP8).max
# A block's code is compiled anew for each of its shapes in each number of rows.
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


def made(unet: Any, is_compiled: bool, is_fp8: bool) -> Any:
    """The other form of a UNet on its device."""
    shared = {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())}
    twin = copy.deepcopy(unet, shared)
    if is_fp8:
        for block, name, layer in list(_transformer_layers(twin)):
            setattr(block, name, Fp8Linear(layer))
    if is_compiled:
        torch._dynamo.config.recompile_limit = _MAX_COMPILED
        torch._dynamo.config.accumulated_recompile_limit = _MAX_COMPILED
        for module in twin.modules():
            if type(module).__name__ in _REGIONS:
                module.forward = torch.compile(module.forward, fullgraph=True, dynamic=False)
    return twin


def _transformer_layers(unet: Module) -> Iterator[tuple[Module, str, Linear]]:
    """The linear layers within transformer blocks, but for those that read the text: it is short."""
    for name, module in unet.named_modules():
        if "transformer_blocks" in name:
            for child_name, child in module.named_children():
                reads_text = child_name in {"to_k", "to_v"} and ".attn2" in name
                if isinstance(child, Linear) and not reads_text and not (child.in_features | child.out_features) % 16:
                    yield module, child_name, child
