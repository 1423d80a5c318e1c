"""Latents of a dataset: those of the picture, and of its mirror image, whether they are kept or made anew."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from gpu_worker.models import weights
from gpu_worker.tasks.stages import as_tensor
from gpu_worker.trainer import dataset
from gpu_worker.trainer.latents import Latents
from services.common.payloads.training import check_training
from tests.gpu_worker.conftest import as_cached
from tests.gpu_worker.engine.test_decoding import memory_for
from tests.gpu_worker.trainer.conftest import draw
from tests.pictures import noise


@pytest.mark.parametrize("cached", [True, False], ids=["kept", "made anew"])
def test_latents_are_those_of_the_picture_or_of_its_mirror_image(
    tiny_checkpoint: Path, tmp_path: Path, cached: bool
) -> None:
    models = weights.load(as_cached(tiny_checkpoint), None, "cpu")
    (tmp_path / "1_zog").mkdir()
    image = noise()
    image.save(tmp_path / "1_zog" / "a.png")
    [picture] = dataset.read(
        check_training({"train_data_dir": str(tmp_path), "resolution": "64,64"}), lambda _: None
    ).pictures

    def encoded(side: Image.Image, generator: torch.Generator) -> torch.Tensor:
        with torch.no_grad():
            found = models.vae.encode(as_tensor(np.asarray(side))).latent_dist.sample(generator)
        return found * models.vae.config.scaling_factor

    chance = torch.Generator().manual_seed(0)
    expected = torch.cat([encoded(side, chance) for side in (image, ImageOps.mirror(image))])
    latents, counts = Latents(models, cached=cached, flips=True), []
    generator = torch.Generator().manual_seed(0)
    latents.prepare([picture], generator, counts.append)
    assert counts == ([1] if cached else [])
    found = latents.batch([picture, picture], [False, True], generator)
    assert torch.equal(found, expected)
    assert not torch.allclose(found[0], found[1].flip(2), atol=1e-3), "pixels are mirrored, not latents"
    assert torch.equal(latents.batch([picture], [False], generator)[0], expected[0]) == cached


def test_a_picture_that_does_not_fit_is_encoded_in_tiles(tiny_checkpoint: Path, tmp_path: Path) -> None:
    models = weights.load(as_cached(tiny_checkpoint), None, "cpu")
    draw(tmp_path / "1_zog" / "a.png", (256, 256))
    config = check_training({"train_data_dir": str(tmp_path), "resolution": "256,256"})
    [picture] = dataset.read(config, lambda _: None).pictures
    latents = Latents(models, cached=False, flips=False)
    with memory_for(models.vae.encoder, 128) as sides:
        found = latents.batch([picture], [False], torch.Generator().manual_seed(0))
    assert (sides[0], max(sides[1:]), found.shape) == (256, 128, (1, 4, 32, 32))
