"""The loop that trains each part: it shows its progress, saves its state, and goes on where it was interrupted.

What a step draws follows from its number, so a training that was interrupted ends with the weights of one that was not.
"""

from __future__ import annotations

import copy
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
from torch.utils.data import DataLoader, Dataset

_SAVE_SECONDS = 60.0
_LINE_SECONDS = 5.0  # between lines where there is no terminal for a bar
_BAR_SECONDS = 0.5  # and between updates of a bar
_MAX_NORM = 1.0
_WEIGHT_DECAY = 0.01
_NUM_EAGER = 4  # steps before the graph is captured, which allocate what it needs

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

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """What an earlier run has left under this name, or makes and leaves it."""
        path = self.folder / f"{name}.pt"
        if not path.exists():
            _save(make(), path)
        return torch.load(path, map_location=self.device, weights_only=True)


# Of the share of the steps that is done, as a tensor of no dimension, and of what is made for the step.
Loss = Callable[[torch.Tensor, list[torch.Tensor]], torch.Tensor]


def train(plan: Plan, model: torch.nn.Module, made: Dataset[Batch], loss: Loss, studio: Studio) -> None:
    """Minimises the loss of each step, from the first or from where a run in the studio's folder has come; the model
    ends with the mean of its weights. Before each step torch's chance is set by its number."""
    trained = _Training(plan, model, loss, studio.device)
    path, first = studio.folder / f"{plan.name}.pt", 0
    if path.exists():
        state = torch.load(path, map_location=studio.device, weights_only=True)
        first = state["step"]
        trained.load(state)
    model.train()
    saved_at = time.monotonic()
    with _shown(plan.name, first, plan.num_steps) as show:
        for step, batch in enumerate(studio.batches(made, first, plan.num_steps), first):
            torch.manual_seed(int(chance(studio.seed, plan.name, step).integers(2**63)))
            found = trained.step(step, batch)
            is_last = step + 1 == plan.num_steps
            if is_last or time.monotonic() - saved_at > _SAVE_SECONDS:
                _save({"step": step + 1} | trained.state(), path)
                saved_at = time.monotonic()
            show(step, found)
    model.load_state_dict(trained.averaged.state_dict())
    model.eval()


class _Training:
    """A model on its way. On CUDA a step is one graph: it is made of some 2000 kernels, and Python would take six times
    as long to start them one by one as they run. So whatever differs from step to step is in tensors that stay."""

    def __init__(self, plan: Plan, model: torch.nn.Module, loss: Loss, device: torch.device) -> None:
        self._plan, self._model, self._loss = plan, model, loss
        self.averaged = copy.deepcopy(model)
        self._optimizer = torch.optim.AdamW(
            _groups(model),
            lr=torch.tensor(plan.learning_rate, device=device),
            betas=(0.9, 0.99),
            fused=True,
            capturable=device.type == "cuda",
        )
        self._done, self._newness, self._found = (torch.zeros((), device=device) for _ in range(3))
        self._batch: list[torch.Tensor] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._num_eager = _NUM_EAGER if device.type == "cuda" else plan.num_steps

    def step(self, step: int, batch: list[torch.Tensor]) -> torch.Tensor:
        """Takes a step and answers its loss, in a tensor that the next step overwrites."""
        for group in self._optimizer.param_groups:
            group["lr"].fill_(self._plan.rate(step))
        self._done.fill_(step / self._plan.num_steps)
        # The mean forgets its beginnings sooner: it is one of a few steps at first.
        self._newness.fill_(1 - min(self._plan.decay, (1 + step) / (10 + step)))
        if not self._batch:
            self._batch = [part.clone() for part in batch]
        for stays, part in zip(self._batch, batch, strict=True):
            stays.copy_(part)
        if self._graph is not None:
            self._graph.replay()
        elif self._num_eager > 0:
            self._num_eager -= 1
            self._take()
        else:
            self._graph = torch.cuda.CUDAGraph()
            # Another thread pins batches in the meantime.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._take()
            self._graph.replay()
        return self._found

    def _take(self) -> None:
        self._optimizer.zero_grad()
        loss = self._loss(self._done, self._batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), _MAX_NORM)
        self._optimizer.step()
        with torch.no_grad():
            for mean, current in zip(self.averaged.parameters(), self._model.parameters(), strict=True):
                mean.lerp_(current, self._newness)
        self._found.copy_(loss.detach())

    def state(self) -> dict[str, Any]:
        """What another run needs to go on."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from another run's state."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        return {"model": self._model, "averaged": self.averaged, "optimizer": self._optimizer}


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
