"""A whole training against a plain loop that is written here, from the pictures' files to the losses: the order of
pictures, their latents, flips, captions and weights, and the seeds of each epoch."""

import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gpu_worker.models import weights
from gpu_worker.models.weights import Models
from gpu_worker.trainer.steps import Batch
from services.common.payloads.training import Training
from tests.gpu_worker import tiny_sdxl
from tests.gpu_worker.conftest import as_cached
from tests.gpu_worker.tables import slow
from tests.gpu_worker.trainer.conftest import Trainings, draw
from tests.gpu_worker.trainer.plain import PlainSteps
from tests.gpu_worker.trainer.small import Notes

# Two steps for an epoch, and three in all; everything that is left to chance, but dropout.
NUM_STEPS = 3
KEYS: dict[str, Any] = {
    "train_batch_size": 2, "max_train_epochs": None, "max_train_steps": NUM_STEPS, "prior_loss_weight": 0.5,
    "flip_aug": True, "shuffle_caption": True, "keep_tokens": 1, "unet_lr": 1e-2, "text_encoder_lr": 1e-2,
}  # fmt: skip
TAGS = {"a": "zog, red, round, on a table", "b": "zog, green, flat, on grass", "c": "thing, blue, old, in a box"}
WIDTH = 97  # of pictures of 64x64, which are not symmetrical then


def pixels_of(path: Path) -> torch.Tensor:
    """The middle of a picture, from -1 to 1."""
    left = (WIDTH - 64) // 2
    values = torch.from_numpy(np.asarray(Image.open(path).convert("RGB"))[:, left : left + 64].copy())
    return values.permute(2, 0, 1)[None] / 127.5 - 1


def reference_losses(models: Models, config: Training, own: list[Path], others: list[Path]) -> list[float]:
    """The plain loop."""
    steps = PlainSteps(models, config, NUM_STEPS)
    drawn = torch.Generator().manual_seed(config.seed)
    latents = {}
    for path in own + others:
        for flipped in (False, True):
            pixels = pixels_of(path)
            with torch.no_grad():
                found = models.vae.encode(pixels.flip(3) if flipped else pixels).latent_dist.sample(drawn)
            latents[path, flipped] = found[0] * models.vae.config.scaling_factor
    losses: list[float] = []
    for epoch in (1, 2):
        seed = int.from_bytes(hashlib.sha256(f"{config.seed} {epoch}".encode()).digest()[:4], "big")
        chance, noise = random.Random(seed), torch.Generator().manual_seed(seed)
        order = own + others * 2  # as many of the others as there are own ones
        chance.shuffle(order)
        pairs = [order[:2], order[2:]]
        chance.shuffle(pairs)
        for pair in pairs[: NUM_STEPS - len(losses)]:
            flips = [chance.random() < 0.5 for _ in pair]
            captions = []
            for path in pair:
                first, *tags = TAGS[path.stem].split(", ")
                chance.shuffle(tags)
                captions.append(", ".join([first, *tags]))
            # SDXL: the picture's height and width, top and left of what is seen, its height and width
            sizes = torch.tensor([[64.0, WIDTH, 0, 17 if flip else 16, 64, 64] for flip in flips])
            counts = torch.tensor([0.5 if path in others else 1.0 for path in pair])
            seen = torch.stack([latents[key] for key in zip(pair, flips, strict=True)])
            losses.append(steps.step([Batch(seen, captions, counts, sizes)], noise))
    return losses


@pytest.mark.parametrize("family", ["sd15", *slow(["sdxl"])])
def test_the_losses_of_a_training_are_those_of_a_plain_loop(trainings: Trainings, tmp_path: Path, family: str) -> None:
    if family == "sdxl":
        trainings.checkpoint = tiny_sdxl.make(tmp_path / "tiny-xl.safetensors").path
    trainings.pictures = tmp_path / "own"
    own = [trainings.pictures / "1_zog" / "a.png", trainings.pictures / "1_zog" / "b.png"]
    others = [tmp_path / "others" / "1_thing" / "c.png"]
    for shade, path in enumerate(own + others):
        draw(path, (WIDTH, 64), shade=80 * shade)
        path.with_suffix(".txt").write_text(TAGS[path.stem])
    notes = Notes()
    keys = KEYS | {"reg_data_dir": str(tmp_path / "others")}
    trainings.run(notes, **keys)
    models = weights.load(as_cached(trainings.checkpoint), None, "cpu")
    expected = reference_losses(models, trainings.config(**keys), own, others)
    assert [step.epoch for step in notes.steps] == [1, 1, 2]
    assert notes.losses == pytest.approx(expected, abs=1e-6, rel=1e-6)
