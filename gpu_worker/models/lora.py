"""LoRA files in kohya's layout: LoRA, LoCon, LoHa, LoKr, and DoRA of these, added to the layers of a model for some
rows of a call.

The weights of the model stay as they are, so that the rows of one UNet call can have different networks. What a row
gets equals a merge into the weights up to the last bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import Conv2d, Linear, Module, functional

from gpu_worker.files.cache import CachedModel
from gpu_worker.job import JobError
from gpu_worker.models import ldm
from gpu_worker.models.weights import Models, Weights, read

# Given the layer and its input. It does not keep the layer: a file in memory must not hold a checkpoint there.
Delta = Callable[[Any, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class OfInput:
    """What a network adds to a layer's input, given that."""

    delta: Callable[[torch.Tensor], torch.Tensor]


# By the layer's name in the model.
Deltas = dict[str, Delta | OfInput]
# Rows of a call, and what a network adds to the layers for them, by which factor.
Change = tuple[slice, float, Deltas]

# Layers by kohya's names, with their own.
Layers = dict[str, tuple[str, Module]]

_UNET, _TEXT = "lora_unet_", "lora_te"
_KINDS = "LoRA, LoCon, LoHa and LoKr"
_LOW_RANK = {"lora_down.weight", "lora_up.weight", "lora_mid.weight"}
_HADAMARD = {f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}
_KRONECKER = {f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}
_MAGNITUDE = "dora_scale"
_ALPHA = "alpha"
_PARTS = _LOW_RANK | _HADAMARD | _KRONECKER | {"diff", _ALPHA, _MAGNITUDE}


@dataclass(frozen=True, eq=False)
class Network:
    """A LoRA or hypernetwork for one checkpoint: what it adds to the layers of the UNet and of each text encoder."""

    unet: Deltas
    texts: tuple[Deltas, ...]


def load(file: CachedModel, models: Models, base_name: str) -> Network:
    """Reads a LoRA for these models.

    Raises:
        JobError: the file is damaged, no LoRA, or made for another architecture; the message names both files.
    """
    groups: dict[str, Weights] = {}
    for key, tensor in read(file.path, file.name)[0].items():
        layer, _, part = key.partition(".")
        groups.setdefault(layer, {})[part] = tensor
    if not any(layer.startswith((_UNET, _TEXT)) for layer in groups):
        raise JobError(f"{file.name} is no LoRA in kohya's layout (lora_unet_…, lora_te_…)")
    tables = [_unet_layers(models), *_text_layers(models)]
    found: list[Deltas] = [{} for _ in tables]
    for layer, parts in groups.items():
        place = next((index for index, table in enumerate(tables) if layer in table), None)
        if place is None:
            raise JobError(
                f"{file.name} is a LoRA for another architecture than {base_name}, which has no layer {layer}"
            )
        path, module = tables[place][layer]
        found[place][path] = _delta(file.name, base_name, layer, parts, module, models.device)
    return Network(found[0], tuple(found[1:]))


@contextmanager
def applied(model: Module, changes: Iterable[Change]) -> Iterator[None]:
    """Within it, the model's layers add what the networks say, for the rows they say it for."""
    to_inputs: dict[str, list[tuple[slice, float, OfInput]]] = {}
    to_outputs: dict[str, list[tuple[slice, float, Delta]]] = {}
    for rows, scale, deltas in changes:
        if scale:
            for layer, delta in deltas.items():
                if isinstance(delta, OfInput):
                    to_inputs.setdefault(layer, []).append((rows, scale, delta))
                else:
                    to_outputs.setdefault(layer, []).append((rows, scale, delta))
    hooks = [
        *(model.get_submodule(layer).register_forward_pre_hook(partial(_bend, of)) for layer, of in to_inputs.items()),
        *(model.get_submodule(layer).register_forward_hook(partial(_add, of)) for layer, of in to_outputs.items()),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _add(
    entries: list[tuple[slice, float, Delta]], layer: Module, inputs: tuple[Any, ...], output: torch.Tensor
) -> None:
    for rows, scale, delta in entries:
        output[rows] += scale * delta(layer, inputs[0][rows])


def _bend(entries: list[tuple[slice, float, OfInput]], _: Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    x = inputs[0].clone()
    for rows, scale, of_input in entries:
        x[rows] += scale * of_input.delta(x[rows])
    return x, *inputs[1:]


def _unet_layers(models: Models) -> Layers:
    """The UNet's layers by kohya's names: diffusers' (SD1.5) and the original layout's (SDXL)."""
    layers: Layers = {}
    for name, module in models.unet.named_modules():
        if isinstance(module, Linear | Conv2d):
            original = ldm.unet_name(f"{name}.weight", models.unet.config).removeprefix(ldm.UNET)
            for known in (name, original.removesuffix(".weight")):
                layers[_UNET + known.replace(".", "_")] = name, module
    return layers


def _text_layers(models: Models) -> list[Layers]:
    tables = []
    for index, encoder in enumerate(models.text_encoders):
        prefix = f"{_TEXT}{index + 1}_" if models.is_sdxl else f"{_TEXT}_"
        layers: Layers = {}
        for name, module in encoder.model.named_modules():
            if isinstance(module, Linear):
                inner = name.removeprefix("text_model.")
                known = inner if inner == "text_projection" else f"text_model.{inner}"
                layers[prefix + known.replace(".", "_")] = name, module
        tables.append(layers)
    return tables


def _delta(name: str, base_name: str, layer: str, parts: Weights, module: Any, device: torch.device) -> Delta:
    """What the file adds to a layer, on the device. The layer itself may just be away, when it made room for others."""
    weight = module.weight
    unknown = sorted(parts.keys() - _PARTS)
    if unknown:
        raise JobError(f"{name} has {unknown[0]!r} for its layer {layer}, which nothing reads; possible: {_KINDS}")
    is_low_rank = "lora_down.weight" in parts and _MAGNITUDE not in parts
    dtype = weight.dtype if is_low_rank else torch.float32  # products are rounded once, when they are whole
    parts = {part: tensor if part == _ALPHA else tensor.to(device, dtype) for part, tensor in parts.items()}
    try:
        if is_low_rank:
            return _low_rank(parts, module)
        # First without numbers: products of small factors that do not fit may be larger than the memory.
        sizes = {part: tensor if part == _ALPHA else tensor.to("meta") for part, tensor in parts.items()}
        full = _whole(sizes, weight.to("meta", torch.float32))
        if full.numel() == weight.numel():
            full = _whole(parts, weight.to(device, torch.float32))
    except KeyError as error:
        raise JobError(f"{name} lacks {error} for its layer {layer}; possible: {_KINDS}") from None
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError):
        full = None
    if full is None or full.numel() != weight.numel() or full.shape[0] != weight.shape[0]:
        raise JobError(f"{name} is a LoRA for another architecture than {base_name}: its layer {layer} has other sizes")
    return _like(module, full.reshape(weight.shape).to(weight.dtype))


def _low_rank(parts: Weights, module: Any) -> Delta:
    """LoRA (Hu et al. 2021) and LoCon: down to a few dimensions and up again. A convolution's down has its kernel, or
    a third factor between them has it."""
    down, up, middle = parts["lora_down.weight"], parts["lora_up.weight"], parts.get("lora_mid.weight")
    scale = _scale(parts, len(down))
    num_dimensions = module.weight.ndim
    down, up = (_with_dimensions(factor, num_dimensions) for factor in (down, up))
    kernel = down if middle is None else middle
    if down.shape[1] != module.weight.shape[1] or len(up) != len(module.weight) or up.shape[1] != len(kernel):
        raise ValueError
    if kernel.shape[2:] != module.weight.shape[2:]:
        raise ValueError
    if middle is None:
        first, last = _like(module, down), _pointwise(up)
        return lambda layer, x: scale * last(layer, first(layer, x))
    before, between, after = _pointwise(down), _like(module, middle), _pointwise(up)
    return lambda layer, x: scale * after(layer, between(layer, before(layer, x)))


def _whole(parts: Weights, weight: torch.Tensor) -> torch.Tensor:
    """What is added to a layer's weights."""
    full = _full(parts)
    if _MAGNITUDE in parts:
        full = _decomposed(full.reshape(weight.shape), weight, parts[_MAGNITUDE])
    return full


def _full(parts: Weights) -> torch.Tensor:
    """The whole difference of a layer's weights: LoHa (Hyeon-Woo et al. 2022) and LoKr as LyCORIS writes them, and the
    product of a LoRA's factors."""
    if "lora_down.weight" in parts:
        down, up = parts["lora_down.weight"], parts["lora_up.weight"]
        scale = _scale(parts, len(down))
        if "lora_mid.weight" not in parts:
            return up.flatten(1) @ down.flatten(1) * scale
        return torch.einsum("or,rskl,si->oikl", up.flatten(1), parts["lora_mid.weight"], down.flatten(1)) * scale
    if "hada_w1_a" in parts:
        one, other = (_product(parts, f"hada_w{index}", f"hada_t{index}") for index in (1, 2))
        return one * other * _scale(parts, len(parts["hada_w1_b"]))
    if "lokr_w1" in parts or "lokr_w1_a" in parts:
        ranks = [len(parts[name]) for name in ("lokr_w1_b", "lokr_w2_b") if name in parts]
        one = parts["lokr_w1"] if "lokr_w1" in parts else _product(parts, "lokr_w1", "")
        other = parts["lokr_w2"] if "lokr_w2" in parts else _product(parts, "lokr_w2", "lokr_t2")
        one = one.reshape(*one.shape, *(1 for _ in range(other.ndim - one.ndim)))
        return torch.kron(one, other.contiguous()) * (_scale(parts, ranks[-1]) if ranks else 1.0)
    return parts["diff"]


def _decomposed(change: torch.Tensor, weight: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """The difference that DoRA makes of one (Liu et al. 2024): the changed weights have this magnitude, for each output
    or, as older files of LyCORIS have it, for each input."""
    of_output = len(magnitude) == len(weight)
    changed = weight + change
    dimensions = [i for i in range(weight.ndim) if i != (0 if of_output else 1)]
    norm: torch.Tensor = torch.linalg.vector_norm(changed, dim=dimensions, keepdim=True)
    return changed * (magnitude / norm) - weight


def _product(parts: Weights, name: str, core: str) -> torch.Tensor:
    """Two factors, or three in Tucker form."""
    one, other = parts[f"{name}_a"], parts[f"{name}_b"]
    if core not in parts:
        return one @ other
    return torch.einsum("i j k l, i p, j r -> p r k l", parts[core], one, other)


def _scale(parts: Weights, rank: int) -> float:
    return float(parts[_ALPHA]) / rank if _ALPHA in parts else 1.0


def _with_dimensions(factor: torch.Tensor, num_dimensions: int) -> torch.Tensor:
    """A matrix as a convolution of one pixel, or the other way: files write either for either."""
    return factor.reshape(*factor.shape[:2], *factor.shape[2:num_dimensions], *([1] * (num_dimensions - factor.ndim)))


def _like(module: Any, weight: torch.Tensor) -> Delta:
    """A layer as this one, with another weight and no bias. Its padding may change from call to call."""
    if isinstance(module, Linear):
        return lambda _, x: functional.linear(x, weight)
    return lambda layer, x: layer._conv_forward(x, weight, None)


def _pointwise(weight: torch.Tensor) -> Delta:
    if weight.ndim == 2:
        return lambda _, x: functional.linear(x, weight)
    return lambda _, x: functional.conv2d(x, weight)
