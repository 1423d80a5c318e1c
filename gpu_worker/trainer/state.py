"""The state of a training between two epochs, as a file. Randomness is not in it: each epoch has a seed of its own."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpu_worker.job import JobError
from services.common.payloads.training import Training

# What may differ between the process that wrote a state and the one that goes on from it.
_ANY = {
    "output_dir", "logging_dir", "train_data_dir", "reg_data_dir", "pretrained_model_name_or_path", "vae", "notes",
    "unknown",
}  # fmt: skip


@dataclass(frozen=True)
class State:
    """After `epoch` epochs and `step` steps."""

    epoch: int
    step: int
    network: dict[str, torch.Tensor]
    steps: dict[str, Any]


def write(path: Path, state: State, config: Training) -> None:
    """Writes the file whole or not at all; it belongs to this configuration."""
    partial = path.with_name(f".{path.name}.partial")
    network = {name: tensor.cpu() for name, tensor in state.network.items()}
    content = {"epoch": state.epoch, "step": state.step, "network": network, "steps": state.steps}
    torch.save(content | {"config": _fingerprint(config)}, partial)
    os.replace(partial, path)


def read(path: Path, config: Training | None) -> State:
    """The state in a file, of a training with this configuration; None where it was kept for this training alone, whose
    keys another version may have read in another way.

    Raises:
        JobError: it cannot be read, or belongs to another configuration.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        state = State(content["epoch"], content["step"], content["network"], content["steps"])
        found = content["config"]
    except (OSError, RuntimeError, KeyError, TypeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise JobError(f"the state {path.name} is damaged: it cannot be read") from error
    if config is not None and found != _fingerprint(config):
        raise JobError(f"the state {path.name} belongs to a training with another configuration")
    return state


def _fingerprint(config: Training) -> str:
    """Of what was asked for, in whichever order; a key that only a later version knows changes nothing."""
    asked = config.model_dump(mode="json", exclude=_ANY, exclude_defaults=True)
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
