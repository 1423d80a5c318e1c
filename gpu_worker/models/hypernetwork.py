"""Hypernetworks as A1111 trains them: small networks that change what attention makes its keys and values of."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional

from gpu_worker.files.cache import CachedModel
from gpu_worker.job import JobError
from gpu_worker.models import pickles
from gpu_worker.models.lora import Deltas, Network, OfInput
from gpu_worker.models.weights import Models

# In the order of a file's pairs: the first is for keys, the second for values.
_LAYERS = ("to_k", "to_v")
_KEY = re.compile(r"linear\.?(\d+)\.(weight|bias)")  # older files number them from 1, without a dot
_NONE = torch.empty(0)
# torch's, as A1111 names them: by their classes in lower case; its `swish` is another one.
_ACTIVATIONS = {
    name.lower(): getattr(torch.nn, name)()
    for name in (
        "CELU", "ELU", "GELU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyReLU", "LogSigmoid", "Mish",
        "ReLU", "ReLU6", "SELU", "SiLU", "Sigmoid", "Softplus", "Softshrink", "Softsign", "Tanh", "Tanhshrink",
    )
} | {"swish": torch.nn.Hardswish(), "linear": torch.nn.Identity(), "none": torch.nn.Identity()}  # fmt: skip


def load(file: CachedModel, models: Models, base_name: str) -> Network:
    """Reads a hypernetwork for these models.

    Raises:
        JobError: the file is damaged, no hypernetwork, or made for another architecture; the message names both files.
    """
    content = pickles.contents(file.path, file.name)
    pairs = {width: pair for width, pair in content.items() if isinstance(width, int) and _is_pair(pair)}
    if not pairs:
        raise JobError(f"{file.name} is no hypernetwork")
    tensors = [
        tensor for pair in pairs.values() for part in pair for tensor in part.values() if torch.is_tensor(tensor)
    ]
    pickles.check_size(tensors, file.path, file.name)
    activation = str(content.get("activation_func", "linear")).lower()
    if activation not in _ACTIVATIONS:
        raise JobError(f"{file.name} has the activation {activation}; possible: {', '.join(_ACTIVATIONS)}")
    ends_in_activation = bool(content.get("activate_output", True))
    made: dict[tuple[int, str], OfInput] = {}
    for width, pair in pairs.items():
        for kind, part in zip(_LAYERS, pair, strict=True):
            steps = [
                (weight.to(models.device, models.dtype), bias.to(models.device, models.dtype))
                for weight, bias in _steps(part, width, file.name)
            ]
            made[width, kind] = OfInput(_delta(steps, _ACTIVATIONS[activation], ends_in_activation))
    deltas: Deltas = {}
    for name, module in models.unet.named_modules():
        kind = name.rpartition(".")[2]
        if isinstance(module, torch.nn.Linear) and (module.in_features, kind) in made:
            deltas[name] = made[module.in_features, kind]
    if not deltas:
        raise JobError(f"{file.name} is a hypernetwork for another architecture than {base_name}")
    return Network(deltas, ({},) * len(models.text_encoders))


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == len(_LAYERS) and all(isinstance(p, dict) for p in value)


def _steps(part: dict[str, Any], width: int, name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The weights and biases of linear layers and norms, one after the other, from so many values to as many.

    Raises:
        JobError: they do not fit each other.
    """
    layers: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in part.items():
        if (match := _KEY.fullmatch(str(key))) and torch.is_tensor(tensor):
            layers.setdefault(int(match[1]), {})[match[2]] = tensor
    steps = [(layer.get("weight", _NONE), layer.get("bias", _NONE)) for _, layer in sorted(layers.items())]
    sizes = [width, *(bias.numel() for _, bias in steps)]
    fitting = (
        bias.shape == (after,) and weight.shape in {(after, before), (after,)} and (weight.ndim > 1 or before == after)
        for (weight, bias), (before, after) in zip(steps, pairwise(sizes), strict=True)
    )
    if not steps or sizes[-1] != width or not all(fitting):
        raise JobError(f"{name} is damaged: its layers of {width} values do not fit each other")
    return steps


def _delta(
    steps: list[tuple[torch.Tensor, torch.Tensor]], activation: torch.nn.Module, ends_in_activation: bool
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What is added to an input. Each linear layer but the last has its activation, and may have a norm behind it."""
    last = max((index for index, (weight, _) in enumerate(steps) if weight.ndim > 1), default=-1)

    def delta(x: torch.Tensor) -> torch.Tensor:
        for index, (weight, bias) in enumerate(steps):
            if weight.ndim == 1:
                x = functional.layer_norm(x, weight.shape, weight, bias)
            else:
                x = functional.linear(x, weight, bias)
                x = activation(x) if index != last or ends_in_activation else x
        return x

    return delta
