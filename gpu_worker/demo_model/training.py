"""The loop that trains each part: it shows its progress, saves its state, and goes on where it was interrupted.

What a step draws follows from its number, so a training that was interrupted ends with the weights of one that was not.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

_SAVE_SECONDS = 60.0
_LINE_SECONDS = 5.0  # between lines where there is no terminal for a bar
_BAR_SECONDS = 0.5  # and between updates of a bar
_MAX_NORM = 1.0
_WEIGHT_DECAY = 0.01

# What Python makes for one step, in a process of its own.
Batch = tuple[Any, ...]


def chance(seed: int, part: str, step: int) -> np.random.Generator:
    """Chance of one step of one part."""
    return np.random.default_rng([seed, step, *part.encode()])


@dataclass(frozen=True)
class Plan:
    """How long and how fast a part learns. The rate rises over `num_warmup`, stays until that share of the steps which
    `flat` is, and falls to 0 as a cosine. `decay` is that of the running mean of the weights, which is what is kept."""

    name: str
    num_steps: int
    learning_rate: float
    flat: float
    num_warmup: int = 0
    decay: float = 0.0

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        num_flat = self.flat * self.num_steps
        risen = min(1.0, (step + 1) / (self.num_warmup + 1))
        fallen = max(0.0, (step - num_flat) / max(1.0, self.num_steps - num_flat))
        return self.learning_rate * risen * (1 + math.cos(math.pi * fallen)) / 2


@dataclass(frozen=True)
class Studio:
    """Where the training happens: its folder for what must survive an interruption, its device, its seed, and how many
    processes make batches ahead of their steps."""

    folder: Path
    device: torch.device
    seed: int
    num_makers: int = 0

    def batches(self, made: Dataset[Batch], first: int, end: int) -> Iterator[list[torch.Tensor]]:
        """What is made for each step, on the device."""
        steps = range(first, end)
        is_cuda = self.device.type == "cuda"
        for batch in DataLoader(made, None, sampler=steps, num_workers=self.num_makers, pin_memory=is_cuda):
            yield [part.to(self.device, non_blocking=True) for part in batch]

    def generator(self, part: str, step: int) -> torch.Generator:
        """Chance of one step of one part, on the device."""
        return torch.Generator(self.device).manual_seed(int(chance(self.seed, part, step).integers(2**63)))

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """What an earlier run has left under this name, or makes and leaves it."""
        path = self.folder / f"{name}.pt"
        if not path.exists():
            _save(make(), path)
        return torch.load(path, map_location=self.device, weights_only=True)


def train(
    plan: Plan,
    model: torch.nn.Module,
    made: Dataset[Batch],
    loss: Callable[[int, list[torch.Tensor]], torch.Tensor],
    studio: Studio,
) -> None:
    """Minimises the loss of each step and its batch, from the first or from where a run in the studio's folder has
    come; the model ends with the mean of its weights."""
    averaged = AveragedModel(model)
    optimizer = torch.optim.AdamW(_groups(model), betas=(0.9, 0.99), fused=True)
    path, first = studio.folder / f"{plan.name}.pt", 0
    if path.exists():
        state = torch.load(path, map_location=studio.device, weights_only=True)
        first = state["step"]
        for part, name in ((model, "model"), (averaged, "averaged"), (optimizer, "optimizer")):
            part.load_state_dict(state[name])
    model.train()
    saved_at = time.monotonic()
    with _shown(plan.name, first, plan.num_steps) as show:
        for step, batch in enumerate(studio.batches(made, first, plan.num_steps), first):
            for group in optimizer.param_groups:
                group["lr"] = plan.rate(step)
            optimizer.zero_grad()
            found = loss(step, batch)
            found.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_NORM)
            optimizer.step()
            # The mean forgets its beginnings sooner: it is one of a few steps at first.
            averaged.multi_avg_fn = get_ema_multi_avg_fn(min(plan.decay, (1 + step) / (10 + step)))  # type: ignore[no-untyped-call]
            averaged.update_parameters(model)
            is_last = step + 1 == plan.num_steps
            if is_last or time.monotonic() - saved_at > _SAVE_SECONDS:
                state = {"step": step + 1, "model": model.state_dict(), "averaged": averaged.state_dict()}
                _save(state | {"optimizer": optimizer.state_dict()}, path)
                saved_at = time.monotonic()
            show(step, found)
    model.load_state_dict(averaged.module.state_dict())
    model.eval()


def _groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Weights decay; embeddings, of which a step sees few, and biases do not."""
    groups: tuple[list[Any], list[Any]] = ([], [])
    for name, parameter in model.named_parameters():
        groups[parameter.ndim < 2 or "embedding.weight" in name].append(parameter)
    return [{"params": groups[0], "weight_decay": _WEIGHT_DECAY}, {"params": groups[1], "weight_decay": 0.0}]


@contextmanager
def _shown(name: str, first: int, num_steps: int) -> Iterator[Callable[[int, torch.Tensor], None]]:
    """What is told of each step and its loss, and shows one now and then: as a bar on a terminal, elsewhere as a line.
    In between nobody asks for the loss, which would have Python wait for the device."""
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    began = shown_at = time.monotonic()
    interval = _BAR_SECONDS if console.is_terminal else _LINE_SECONDS
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=num_steps, completed=first)

        def show(step: int, loss: torch.Tensor) -> None:
            nonlocal shown_at
            now, num_done = time.monotonic(), step + 1
            if now - shown_at < interval and num_done < num_steps:
                return
            shown_at = now
            text = f"{name}, loss {loss.item():.4f}"
            bar.update(task, completed=num_done, description=text)
            if not console.is_terminal:
                left = (now - began) / (num_done - first) * (num_steps - num_done)
                print(f"{text}, {num_done}/{num_steps}, {left:.0f} s left", flush=True)

        yield show


def _save(state: Any, path: Path) -> None:
    """All or nothing."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)
