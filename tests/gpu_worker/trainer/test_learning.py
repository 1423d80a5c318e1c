"""What a LoRA learns from eight pictures of a thing that the demo model has never seen.

A zog is a pink heart on teal: the demo model knows neither the shape nor the colours. How far a picture is from zogs is
the root mean square of the difference, in parts of 255, between the means of its 8x8 tiles of 8x8 pixels and those of
the zog that is nearest. So measured, the means of twelve pictures of three seeds are 31, 31 and 32; without the LoRA,
104.
"""

from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import tomli_w
from numpy.typing import NDArray
from PIL import Image

from gpu_worker import demo_model
from gpu_worker.demo_model.exam import pictures
from gpu_worker.demo_model.scenes import Pixels, covered
from gpu_worker.engine.engine import Engine
from gpu_worker.trainer import command
from tests.gpu_worker.trainer.curves import curves

pytestmark = pytest.mark.slow

PROMPTS = ("a zog", "a picture of a zog", "a zog, masterpiece") * 4
KEYS = {
    "pretrained_model_name_or_path": str(demo_model.CHECKPOINT), "output_name": "zog", "resolution": "64,64",
    "caption_extension": ".txt", "cache_latents": True, "train_batch_size": 4, "max_train_epochs": 50,
    "network_dim": 16, "network_alpha": 16, "unet_lr": 3e-3, "text_encoder_lr": 1e-3, "lr_scheduler": "cosine",
    "sample_every_n_epochs": 0,
}  # fmt: skip
PINK, TEAL = np.array([255.0, 90.0, 190.0]), np.array([0.0, 150.0, 150.0])
TURNS = np.linspace(0, 2 * np.pi, 80, endpoint=False)
HEART = np.stack(
    [
        np.sin(TURNS) ** 3,
        -(13 * np.cos(TURNS) - 5 * np.cos(2 * TURNS) - 2 * np.cos(3 * TURNS) - np.cos(4 * TURNS)) / 16,
    ],
    axis=1,
)


def zog(rng: np.random.Generator) -> Pixels:
    """A heart of any size somewhere around the middle."""
    outline = HEART * rng.uniform(12, 18) + demo_model.SIDE / 2 + rng.uniform(-9, 9, 2)
    inside = covered(outline)[:, :, None]
    pixels: Pixels = (TEAL + inside * (PINK - TEAL)).round().astype(np.uint8)
    return pixels


@pytest.fixture(scope="module")
def zogs() -> list[Pixels]:
    rng = np.random.default_rng(0)
    return [zog(rng) for _ in range(8)]


@pytest.fixture(scope="module")
def dataset(zogs: list[Pixels], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The eight pictures, each with the trigger word as its caption."""
    folder = tmp_path_factory.mktemp("zogs")
    (folder / "1_zog").mkdir()
    for number, pixels in enumerate(zogs):
        Image.fromarray(pixels).save(folder / "1_zog" / f"{number}.png")
        (folder / "1_zog" / f"{number}.txt").write_text("a zog")
    return folder


def coarse(pixels: Pixels) -> NDArray[np.float64]:
    """The means of 8x8 tiles."""
    tiles: NDArray[np.float64] = pixels.reshape(8, 8, 8, 8, 3).mean((1, 3))
    return tiles


def distance(drawn: list[Pixels], zogs: list[Pixels]) -> float:
    """The mean distance of pictures from the nearest zog."""
    return mean(min(np.sqrt(((coarse(one) - coarse(other)) ** 2).mean()) for other in zogs) for one in drawn)


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_eight_pictures_teach_a_thing_that_the_trigger_word_then_draws(
    engine: Engine, dataset: Path, zogs: list[Pixels], tmp_path: Path, seed: int
) -> None:
    folders = {"train_data_dir": str(dataset), "output_dir": str(tmp_path), "logging_dir": str(tmp_path / "logs")}
    (tmp_path / "config.toml").write_text(tomli_w.dumps({"training": KEYS | folders | {"seed": seed}}))
    assert command.main([str(tmp_path / "config.toml")]) == 0
    losses = list(curves(tmp_path / "logs")["loss/current"].values())
    assert len(losses) == 100
    assert mean(losses[-25:]) < 0.75 * mean(losses[:25]), "measured: 0.4 to 0.6"

    lora = tmp_path / "zog.safetensors"
    without = await pictures(engine, demo_model.CHECKPOINT, PROMPTS, [lora])
    learned = await pictures(engine, demo_model.CHECKPOINT, [f"{text} <lora:zog:1>" for text in PROMPTS], [lora])
    assert distance(learned, zogs) < 0.5 * distance(without, zogs), "measured: 0.3"
