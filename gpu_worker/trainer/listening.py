"""What a training tells while it runs, and who listens: the command line, or the service's stream."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class Stopped(Exception):
    """The training was told to stop."""


@dataclass(frozen=True)
class Plan:
    """What a training is about to do. `first_step` is how many steps an earlier process has done."""

    num_pictures: int
    num_epochs: int
    num_steps: int
    first_step: int


@dataclass(frozen=True)
class Progress:
    """A step that was done, both counted from 1. `average_loss` is the mean over the last epoch's worth of steps."""

    step: int
    epoch: int
    loss: float
    average_loss: float
    rates: dict[str, float]
    seconds_left: float


class Listener(Protocol):
    """Hears of a training. All calls come from the thread that trains."""

    @property
    def wants_stop(self) -> bool:
        """Whether the training shall end before its next step."""

    def log(self, line: str) -> None:
        """A sentence for whoever reads along."""

    def encoded(self, number: int, num_pictures: int) -> None:
        """So many pictures of all have become latents."""

    def begun(self, plan: Plan) -> None:
        """The steps begin."""

    def stepped(self, progress: Progress) -> None:
        """A step was done."""

    def saved(self, path: Path, epoch: int, step: int) -> None:
        """A network was written."""

    def removed(self, path: Path) -> None:
        """A network of an earlier epoch was removed, as the configuration says."""

    def drawn(self, path: Path, epoch: int, prompt: str) -> None:
        """A preview was written, as PNG."""

    def kept(self, path: Path, epoch: int) -> None:
        """The state after an epoch was written, from which a later process can go on."""
