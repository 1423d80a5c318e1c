"""What is trained: factors beside the layers of the models, and their names in a file.

LoRA (Hu et al. 2021) and LoCon are peft's, LoHa and LoKr are LyCORIS' modules. Their weights are fp32, whatever the
precision of the models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.nn import Parameter

from gpu_worker.models.weights import Models
from gpu_worker.trainer.layers import Layer, text_layers, unet_layers
from services.common.payloads.network_args import is_on
from services.common.payloads.training import Training

Tensors = dict[str, torch.Tensor]
_ADAPTER = "default"
_LYCORIS_OPTIONS = {"factor": int, "decompose_both": bool, "full_matrix": bool}


class Network(Protocol):
    """A network beside the models. `unet` and `texts` are what the optimizer changes."""

    unet: list[Parameter]
    texts: list[Parameter]

    def tensors(self) -> Tensors:
        """Its weights and alphas by kohya's names."""

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes the weights that `tensors` gave."""

    def limit(self, norm: float) -> None:
        """Scales what it adds to a layer down to this Frobenius norm where that is larger."""


def create(models: Models, config: Training) -> Network:
    """A fresh network in the layers of the models, which compute with it from now on. Its weights are drawn from
    torch's global generator; what it adds is 0 at first."""
    kind = PeftNetwork if config.algorithm in {"lora", "locon"} else LycorisNetwork
    return kind(models, config)


class PeftNetwork:
    """LoRA, and LoCon for convolutions."""

    def __init__(self, models: Models, config: Training) -> None:
        unet, texts = unet_layers(models, config), text_layers(models, config)
        dropout = config.network_dropout or float(config.network_args.get("dropout", 0))
        self._parts: list[tuple[Layer, Any]] = []
        self.unet = self._inject(models.unet, unet, dropout)
        self.texts: list[Parameter] = []
        for encoder, layers in zip(models.text_encoders, texts, strict=True):
            self.texts += self._inject(encoder.model, layers, dropout)

    def tensors(self) -> Tensors:
        """See Network."""
        found: Tensors = {}
        for layer, module in self._parts:
            found[f"{layer.kohya}.alpha"] = torch.tensor(float(layer.alpha))
            found[f"{layer.kohya}.lora_down.weight"] = module.lora_A[_ADAPTER].weight.detach()
            found[f"{layer.kohya}.lora_up.weight"] = module.lora_B[_ADAPTER].weight.detach()
        return found

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """See Network."""
        for name, own in self.tensors().items():
            own.copy_(tensors[name])

    @torch.no_grad()
    def limit(self, norm: float) -> None:
        """See Network; as sd-scripts do it (networks/lora.py, apply_max_norm_regularization)."""
        for layer, module in self._parts:
            down, up = module.lora_A[_ADAPTER].weight, module.lora_B[_ADAPTER].weight
            rows, columns = down.flatten(1), up.flatten(1)
            # of their product, without making it: the trace of (B'B)(AA')
            square = ((columns.T @ columns) * (rows @ rows.T)).sum().clamp(min=0)
            share = (norm / (square.sqrt() * layer.alpha / layer.rank)).clamp(max=1).sqrt()
            down.mul_(share)
            up.mul_(share)

    def _inject(self, model: Any, layers: Sequence[Layer], dropout: float) -> list[Parameter]:
        if not layers:
            return []
        sizes = {(layer.rank, layer.alpha): "" for layer in layers}  # at most two: matrices' and convolutions'
        for rank, alpha in sizes:
            sizes[rank, alpha] = _one_of(layer for layer in layers if (layer.rank, layer.alpha) == (rank, alpha))
        config = LoraConfig(
            lora_dropout=dropout,
            target_modules=_one_of(layers),
            rank_pattern={names: rank for (rank, _), names in sizes.items()},
            alpha_pattern={names: alpha for (_, alpha), names in sizes.items()},
        )
        inject_adapter_in_model(config, model, _ADAPTER)
        parameters = []
        for layer in layers:
            module: Any = model.get_submodule(layer.name)
            # Autocast brings inputs and weights together; peft's own cast would take them to fp32 and back.
            module.cast_input_dtype_enabled = False
            for factor in (module.lora_A[_ADAPTER], module.lora_B[_ADAPTER]):
                factor.float()
                parameters.append(factor.weight)
            self._parts.append((layer, module))
        return parameters


class LycorisNetwork:
    """LoHa (Hyeon-Woo et al. 2022) and LoKr."""

    def __init__(self, models: Models, config: Training) -> None:
        self._modules: dict[str, Any] = {}
        self.unet = list(self._add(unet_layers(models, config), config, models.device))
        texts = [layer for layers in text_layers(models, config) for layer in layers]
        self.texts = list(self._add(texts, config, models.device))

    def tensors(self) -> Tensors:
        """See Network."""
        return {
            f"{name}.{part}": tensor
            for name, module in self._modules.items()
            for part, tensor in sorted(module.state_dict().items())
        }

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """See Network."""
        for name, module in self._modules.items():
            parts = module.state_dict()
            module.load_state_dict({part: tensors[f"{name}.{part}"] for part in parts}, strict=False)

    @torch.no_grad()
    def limit(self, norm: float) -> None:
        """See Network."""
        for module in self._modules.values():
            share = (norm / module.get_weight(module.shape).norm()).clamp(max=1)
            # What it adds is linear in each factor. LyCORIS' own way keeps a scalar beside them, which is in no state.
            next(module.parameters()).mul_(share)

    def _add(self, layers: Sequence[Layer], config: Training, device: torch.device) -> Iterator[Parameter]:
        from lycoris.modules.loha import LohaModule  # noqa: PLC0415 - few trainings need it
        from lycoris.modules.lokr import LokrModule  # noqa: PLC0415

        kind = {"loha": LohaModule, "lokr": LokrModule}[config.algorithm]
        arguments = config.network_args
        dropouts = {name: float(arguments.get(name, 0)) for name in ("rank_dropout", "module_dropout")}
        options: dict[str, Any] = {
            name: is_on(arguments[name]) if kind is bool else int(arguments[name])
            for name, kind in _LYCORIS_OPTIONS.items()
            if name in arguments
        }
        for layer in layers:
            module = kind(
                layer.kohya,
                layer.module,
                lora_dim=layer.rank,
                alpha=layer.alpha,
                use_tucker=is_on(arguments.get("use_tucker", "")),
                **(dropouts | options),
            )
            module.to(device)
            module.apply_to()
            module.train(layer.module.training)
            layer.module.add_module("lycoris", module)  # which is at rest with its layer, and then without dropout
            self._modules[layer.kohya] = module
            yield from module.parameters()


def _one_of(layers: Iterable[Layer]) -> str:
    """A pattern for the names of layers."""
    return f"^({'|'.join(re.escape(layer.name) for layer in layers)})$"
