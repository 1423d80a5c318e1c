"""Owns a dataset of drawn pictures, and trainings of the tiny checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from gpu_worker.models import weights
from gpu_worker.trainer import dataset
from gpu_worker.trainer.loop import Loop
from services.common.payloads.training import Training, check_training
from tests.gpu_worker.conftest import as_cached
from tests.gpu_worker.trainer.small import SMALL, Notes


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
