"""ControlNet (Zhang et al. 2023): what it adds to the UNet of a call, for each row its own share of each layer.

The residuals of all rows of a call that have a ControlNet are computed at once; rows differ in their picture and in how
much it counts.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.loaders import single_file_utils
from diffusers.models.controlnets.controlnet import ControlNetModel

from gpu_worker.devices import on_device
from gpu_worker.files.cache import CachedModel
from gpu_worker.job import JobError
from gpu_worker.models.tiling import circular
from gpu_worker.models.weights import Empty, Models, Weights, read
from services.common.payloads.controlnet import BALANCED, CONTROL
from services.common.payloads.models import stem

_convert: Any = single_file_utils
_SOFTER = 0.825  # from each layer to the one before it
_SOFT_LAYERS = 13  # of Stable Diffusion 1.5; SDXL has the first ten of them
_LATENT_CHANNELS = 4
# Other kinds of control, by a part of the names in their files.
_OTHERS = {
    "lllite_": "a ControlNet-LLLite",
    "lora_controlnet": "a Control-LoRA",
    "image_proj": "an IP-Adapter",
    "ip_adapter": "an IP-Adapter",
    "adapter.": "a T2I adapter",
    "body.": "a T2I adapter",
    "control_add_embedding": "a ControlNet Union",
    "task_embedding": "a ControlNet Union",
}
# SDXL's embedding of the pooled text and the sizes: diffusers' names and the original's.
_ADDED = {
    "linear_1.weight": "0.weight",
    "linear_1.bias": "0.bias",
    "linear_2.weight": "2.weight",
    "linear_2.bias": "2.bias",
}


@dataclass(frozen=True, eq=False)
class ControlNet:
    """A ControlNet in memory."""

    name: str
    model: Any

    @property
    def is_pooled(self) -> bool:
        """Whether it says the same to each place of the picture."""
        return bool(self.model.config.global_pool_conditions)


@dataclass(frozen=True, eq=False)
class Control:
    """A ControlNet's part in a step: what it looks at, of shape (1, 3, height, width), and how much each of its outputs
    counts, from the first layer to the middle. Without `for_negative` it says nothing to what the picture is led away
    from."""

    net: Any
    hint: torch.Tensor
    scales: tuple[float, ...]
    for_negative: bool


def load(file: CachedModel, models: Models, base_name: str) -> ControlNet:
    """Reads a ControlNet for these models, in the original layout or in diffusers'.

    Raises:
        JobError: the file is damaged, no ControlNet, or made for another architecture; the message names both files.
    """
    weights = read(file.path, file.name)[0]
    for part, kind in _OTHERS.items():
        if any(part in key for key in weights):
            raise JobError(f"{file.name} is {kind}, which cannot be run here; possible: ControlNet")
    # As ControlNetModel.from_unet has it: a ControlNet is a copy of its UNet's first half.
    taken = inspect.signature(ControlNetModel).parameters
    config = {name: value for name, value in models.unet.config.items() if name in taken}
    config |= {"in_channels": _LATENT_CHANNELS, "global_pool_conditions": "shuffle" in stem(file.name).lower()}
    with Empty():
        model: Any = ControlNetModel(**config)
    converted = _converted(weights, config)
    expected = model.state_dict()
    if not any(key.startswith("controlnet_cond_embedding.") for key in converted):
        raise JobError(f"{file.name} is no ControlNet")
    if any(key not in converted or converted[key].shape != tensor.shape for key, tensor in expected.items()):
        raise JobError(f"{file.name} is a ControlNet for another architecture than {base_name}")
    model.load_state_dict({key: converted[key].to(models.dtype) for key in expected}, assign=True)
    return ControlNet(file.name, model.requires_grad_(False).eval().to(models.device))


def _converted(weights: Weights, config: dict[str, Any]) -> Weights:
    """By diffusers' names; nothing where they have none."""
    # diffusers' own conversion forgets these, and takes weights out of what it is given.
    added = {f"add_embedding.{ours}": _of_control(weights, f"label_emb.0.{theirs}") for ours, theirs in _ADDED.items()}
    try:
        found = _convert.convert_controlnet_checkpoint(weights, config)
    except (KeyError, IndexError):
        return {}
    return {key: tensor for key, tensor in (added | found).items() if tensor is not None}


def _of_control(weights: Weights, name: str) -> torch.Tensor | None:
    return weights.get(f"control_model.{name}", weights.get(name))


def scales(model: Any, weight: float, mode: str, is_soft: bool) -> tuple[float, ...]:
    """How much each output counts. Where the prompt or the ControlNet is more important, or when it shall be soft, the
    first layers, which say the most about details, count least (the extension's weights, scripts/hook.py)."""
    num_outputs = len(model.controlnet_down_blocks) + 1
    if mode == BALANCED and not is_soft:
        return (weight,) * num_outputs
    return tuple(weight * _SOFTER ** (_SOFT_LAYERS - 1 - index) for index in range(num_outputs))


def control(net: ControlNet, hint: torch.Tensor, weight: float, mode: str, is_soft: bool) -> Control:
    """A ControlNet's part in the steps of a pass."""
    return Control(net.model, hint, scales(net.model, weight, mode, is_soft), mode != CONTROL and not net.is_pooled)


class Residuals:
    """What ControlNets add to a UNet call. All its parts have the same nets, in the same order; a part has some rows,
    and is the negative one or not."""

    def __init__(
        self, parts: Sequence[tuple[tuple[Control, ...], bool]], counts: Sequence[int], tiling: bool = False
    ) -> None:
        self._tiling = tiling
        self._nets = [control.net for control in parts[0][0]] if parts else []
        self._hints, self._scales = [], []
        for index in range(len(self._nets)):
            own = [(controls[index], is_negative) for controls, is_negative in parts]
            hints = [c.hint.expand(n, -1, -1, -1) for (c, _), n in zip(own, counts, strict=True)]
            shares = [
                c.scales if c.for_negative or not is_negative else (0.0,) * len(c.scales)
                for (c, is_negative), n in zip(own, counts, strict=True)
                for _ in range(n)
            ]
            self._hints.append(torch.cat(hints))
            dtype, device = self._hints[-1].dtype, self._hints[-1].device
            self._scales.append(on_device(torch.tensor(shares).to(dtype), device))

    def of(
        self,
        rows: slice,
        x: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        added: dict[str, torch.Tensor],
    ) -> dict[str, Any]:
        """Arguments of the UNet for these rows of the call, whose other arguments are given for the same rows."""
        told = {"encoder_hidden_states": text, "added_cond_kwargs": added}
        total: list[torch.Tensor] = []
        for net, hints, shares in zip(self._nets, self._hints, self._scales, strict=True):
            with circular(net, self._tiling):
                down, middle = net(
                    x[:, :_LATENT_CHANNELS], timestep, controlnet_cond=hints[rows], return_dict=False, **told
                )
            weighed = list(_weighed([*down, middle], shares[rows]))
            total = [before + added for before, added in zip(total, weighed, strict=True)] if total else weighed
        if not total:
            return {}
        return {"down_block_additional_residuals": tuple(total[:-1]), "mid_block_additional_residual": total[-1]}


def _weighed(outputs: list[torch.Tensor], shares: torch.Tensor) -> Iterator[torch.Tensor]:
    for output, share in zip(outputs, shares.T, strict=True):
        yield output * share[:, None, None, None]
