"""What a trainer tells, as the service understands it. Files are named as in the training's output."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Uploaded:
    """An object that was uploaded; `sha256` in hex."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Point:
    """A step, from 1; `learning_rates` by the part that is trained."""

    step: int
    epoch: int
    loss: float
    average_loss: float
    learning_rates: dict[str, float]


@dataclass(frozen=True)
class Phase:
    """The trainer does something else now."""

    status: str


@dataclass(frozen=True)
class Progress:
    """Steps since the last progress."""

    points: list[Point]
    num_steps: int
    num_epochs: int
    seconds_left: float


@dataclass(frozen=True)
class Log:
    """A line for the owner."""

    line: str


@dataclass(frozen=True)
class Saved:
    """A network."""

    file: Uploaded
    epoch: int


@dataclass(frozen=True)
class Preview:
    """A picture."""

    file: Uploaded
    epoch: int
    prompt: str


@dataclass(frozen=True)
class Removed:
    """A network that is not wanted any more."""

    name: str


@dataclass(frozen=True)
class Board:
    """TensorBoard's event file."""

    file: Uploaded


@dataclass(frozen=True)
class Kept:
    """The state after an epoch."""

    file: Uploaded
    epoch: int


@dataclass(frozen=True)
class Done:
    """All is told."""


@dataclass(frozen=True)
class Failed:
    """It cannot be done."""

    reason: str


Fact = Phase | Progress | Log | Saved | Preview | Removed | Board | Kept | Done | Failed
