"""A training of seconds, and who remembers what it tells. Benchmarks use both, on machines that have no pytest."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_worker.trainer import listening

# 64 pixels, a step for each of four pictures.
SMALL: dict[str, Any] = {
    "resolution": "64,64",
    "caption_extension": ".txt",
    "cache_latents": True,
    "network_dim": 4,
    "network_alpha": 2,
    "unet_lr": 1e-3,
    "text_encoder_lr": 1e-3,
    "max_train_epochs": 1,
    "sample_every_n_epochs": 0,
    "seed": 5,
}


@dataclass
class Notes:
    """Remembers what a training tells. `stop_after` steps it wants the end."""

    stop_after: int | None = None
    lines: list[str] = field(default_factory=list)
    plans: list[listening.Plan] = field(default_factory=list)
    steps: list[listening.Progress] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    drawings: list[Path] = field(default_factory=list)
    on_kept: Callable[[Path, int], None] = lambda path, epoch: None

    @property
    def wants_stop(self) -> bool:
        return self.stop_after is not None and len(self.steps) >= self.stop_after

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return [step.loss for step in self.steps]

    def log(self, line: str) -> None:
        self.lines.append(line)

    def encoded(self, number: int, num_pictures: int) -> None:
        pass

    def begun(self, plan: listening.Plan) -> None:
        self.plans.append(plan)

    def stepped(self, progress: listening.Progress) -> None:
        self.steps.append(progress)

    def saved(self, path: Path, epoch: int, step: int) -> None:
        self.files.append(path.name)

    def removed(self, path: Path) -> None:
        self.gone.append(path.name)

    def drawn(self, path: Path, epoch: int, prompt: str) -> None:
        self.drawings.append(path)

    def kept(self, path: Path, epoch: int) -> None:
        self.on_kept(path, epoch)
