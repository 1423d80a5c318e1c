"""Owns a dataset of drawn pictures, and trainings of the tiny checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from gpu_worker import weights
from gpu_worker.trainer import dataset, listening
from gpu_worker.trainer.loop import Loop
from services.common.payloads.training import Training, check_training
from tests.gpu_worker.conftest import as_cached

# A training of seconds: 64 pixels, a step for each of four pictures.
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


def draw(path: Path, size: tuple[int, int] = (64, 64), shade: int = 100) -> None:
    """A circle on a coloured ground."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, (200, shade, 40))
    ImageDraw.Draw(image).ellipse((size[0] // 8, size[1] // 8, size[0] // 2, size[1] // 2), fill=(0, 255, shade))
    image.save(path)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures of one concept, with captions."""
    folder = tmp_path_factory.mktemp("dataset")
    for index in range(4):
        path = folder / "1_zog" / f"{index}.png"
        draw(path, shade=60 * index)
        path.with_suffix(".txt").write_text(f"zog, green, number {index}\n")
    return folder


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

    def saved(self, path: Path, epoch: int, step: int, *, is_last: bool) -> None:
        self.files.append(path.name)

    def removed(self, path: Path) -> None:
        self.gone.append(path.name)

    def drawn(self, path: Path, epoch: int, prompt: str) -> None:
        self.drawings.append(path)

    def kept(self, path: Path, epoch: int) -> None:
        self.on_kept(path, epoch)


@dataclass
class Trainings:
    """Runs trainings on the CPU in a folder."""

    checkpoint: Path
    pictures: Path
    folder: Path

    def config(self, **fields: Any) -> Training:
        """A small training with these keys."""
        return check_training(SMALL | {"train_data_dir": str(self.pictures)} | fields)

    def loop(self, notes: Notes, out: str = "out", **fields: Any) -> Loop:
        """A training that has not begun."""
        config = self.config(**fields)
        base = as_cached(self.checkpoint)
        models = weights.load(base, None, "cpu")
        return Loop(config, models, base, dataset.read(config, notes.log), self.folder / out, notes)

    def run(self, notes: Notes | None = None, out: str = "out", resumed: Path | None = None, **fields: Any) -> Notes:
        """A training to its end."""
        notes = notes or Notes()
        self.loop(notes, out, **fields).run(resumed)
        return notes


@pytest.fixture
def trainings(tiny_checkpoint: Path, pictures: Path, tmp_path: Path) -> Trainings:
    """Trainings of the tiny SD1.5 checkpoint on the four pictures."""
    return Trainings(tiny_checkpoint, pictures, tmp_path)
