"""What changes the weights, and how fast: optimizers of torch and of the libraries that kohya uses, schedules of
diffusers."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers.optimization import get_scheduler

from gpu_worker.engine.importing import find_hidden
from gpu_worker.job import JobError
from gpu_worker.trainer.networks import Network
from services.common.payloads.training import Training

# Each is imported by whoever wants it.
_LIBRARIES = {"Adafactor": "transformers.optimization", "Lion": "lion_pytorch", "Prodigy": "prodigyopt"}


def create_optimizer(config: Training, network: Network, device: torch.device, log: Callable[[str], None]) -> Any:
    """The optimizer over the network's parts, each with its own rate; a part whose rate is 0 stays as it is.

    Raises:
        JobError: it does not take the configuration's `optimizer_args`.
    """
    parts = [("unet", network.unet, config.unet_rate), ("text", network.texts, config.text_rate)]
    groups = [
        {"params": parameters, "lr": rate, "name": name} for name, parameters, rate in parts if parameters and rate
    ]
    for _, parameters, rate in parts:
        for parameter in parameters:
            parameter.requires_grad_(rate > 0)  # else gradients pile up that nobody clears, and clipping counts them
    if not groups:
        raise JobError("nothing would be trained: the learning rate of every part of the network is 0")
    kind, options = _kind(config.optimizer_type, device, log)
    possible = inspect.signature(kind).parameters.keys() - {"params", "lr"}
    if unknown := sorted(config.optimizer_args.keys() - possible):
        named = f"optimizer_args {', '.join(unknown)}: {config.optimizer_type} has no such options"
        raise JobError(f"{named}; possible: {', '.join(sorted(possible))}")
    options |= {name: _value(text) for name, text in config.optimizer_args.items()}
    try:
        return kind(groups, lr=groups[0]["lr"], **options)
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{name}={text}" for name, text in config.optimizer_args.items())
        raise JobError(f"optimizer_args {given} are not possible for {config.optimizer_type}: {error}") from None


def load_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Takes the state of an optimizer of the same class, maybe of another device: how it computes stays its own."""
    groups = zip(state["param_groups"], optimizer.param_groups, strict=True)
    # A loss scaler hands its part to an optimizer that was made `fused`, which fails if the state says otherwise.
    own = [saved | {"fused": group["fused"]} if "fused" in group else saved for saved, group in groups]
    optimizer.load_state_dict(state | {"param_groups": own})


def create_schedule(config: Training, optimizer: Any, num_steps: int) -> Any:
    """The course of the learning rates over so many steps.

    Raises:
        JobError: the schedule does not take the configuration's `lr_scheduler_args`.
    """
    warmup = config.lr_warmup_steps
    try:
        return get_scheduler(
            config.lr_scheduler,
            optimizer,
            step_rules=config.lr_scheduler_args.get("step_rules"),
            num_warmup_steps=int(warmup * num_steps if warmup < 1 else warmup),
            num_training_steps=num_steps,
            num_cycles=config.lr_scheduler_num_cycles,
            power=config.lr_scheduler_power,
        )
    except (ValueError, AttributeError) as error:
        raise JobError(
            f"lr_scheduler {config.lr_scheduler} is not possible with these lr_scheduler_args: {error}; "
            "piecewise_constant needs step_rules, such as step_rules=1:100,0.1:200,0.01"
        ) from None


def rates(optimizer: Any) -> dict[str, float]:
    """The present learning rate of each part; Prodigy's is the one that it found."""
    return {group["name"]: float(group["lr"] * group.get("d", 1.0)) for group in optimizer.param_groups}


def _kind(name: str, device: torch.device, log: Callable[[str], None]) -> tuple[Any, dict[str, Any]]:
    """The optimizer's class and the options that the device makes."""
    if name in _LIBRARIES:
        return getattr(importlib.import_module(_LIBRARIES[name]), name), {}
    if name == "AdamW8bit":
        if device.type == "cuda":
            return find_hidden("bitsandbytes.optim").AdamW8bit, {}
        log("optimizer_type AdamW8bit: it needs CUDA, which is not here, so it is AdamW with 32 bits")
    return torch.optim.AdamW, {"fused": True} if device.type == "cuda" else {}


def _value(text: str) -> Any:
    """The Python value of an argument, as kohya reads it; what is none is text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
