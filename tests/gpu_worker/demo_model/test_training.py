"""How the demo model is trained: interruptions change nothing, latents are normal, the command writes a checkpoint."""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch.utils.data import Dataset

from gpu_worker.demo_model import __main__ as command
from gpu_worker.demo_model import architecture, denoiser, exam, report, training, vae
from gpu_worker.demo_model.scenes import SCENES
from gpu_worker.demo_model.training import Batch, Plan, Studio, chance, train
from gpu_worker.models.weights import load, tokenizer
from tests.gpu_worker.conftest import as_cached

PLAN = Plan("line", num_steps=30, learning_rate=0.1, flat=0.5, num_warmup=3, decay=0.9)


@dataclass(frozen=True)
class FewDrawn(vae.Drawn):
    """Pictures for a step, of which there are fewer."""

    number: int = 16


class Interruption(Exception):
    """Somebody pulled the plug."""


class Noise(Dataset[Batch]):
    """Eight points a step."""

    def __getitem__(self, step: int) -> Batch:
        return (chance(4, PLAN.name, step).standard_normal((8, 3), dtype=np.float32),)


def fitted(folder: Path, stop_at: int | None = None, num_makers: int = 0) -> torch.Tensor:
    """A line fitted to noise, after all steps or until the interruption."""
    folder.mkdir(exist_ok=True)
    studio = Studio(folder, torch.device("cpu"), 4, num_makers)
    torch.manual_seed(0)
    line = torch.nn.Linear(3, 1)

    def loss(done: torch.Tensor, batch: list[torch.Tensor]) -> torch.Tensor:
        if stop_at is not None and done.item() * PLAN.num_steps >= stop_at - 0.5:
            raise Interruption
        (points,) = batch
        return ((line(points) - torch.randn(8, 1)) ** 2).mean()

    train(PLAN, line, Noise(), loss, studio)
    return torch.cat([parameter.flatten().detach() for parameter in line.parameters()])


def test_a_training_that_was_interrupted_twice_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_SAVE_SECONDS", 0.0)
    for stop_at in (7, 22):
        with pytest.raises(Interruption):
            fitted(tmp_path / "interrupted", stop_at)
    assert torch.equal(fitted(tmp_path / "interrupted"), fitted(tmp_path / "whole"))


def test_processes_that_work_ahead_change_nothing(tmp_path: Path) -> None:
    assert torch.equal(fitted(tmp_path / "ahead", num_makers=2), fitted(tmp_path / "alone"))


def test_each_latent_goes_with_a_caption_of_its_scene() -> None:
    scenes = chance(0, "scenes", 0).integers(len(SCENES), size=1000)
    rows, tokens = denoiser._Asked(0, scenes)[7]
    captions = tokenizer("<|endoftext|>").batch_decode(tokens, skip_special_tokens=True)
    asked = [SCENES[scenes[row]] for row in rows]
    named = [
        all(f"{word} " in f"{text} ".replace(",", " ") for word in (scene.colour, scene.shape, scene.ground))
        for scene, text in zip(asked, captions, strict=True)
    ]
    assert tokens.shape == (len(rows), 77)
    assert 0.85 < sum(named) / len(named) < 0.95  # the others ask for nothing, so that guidance knows what that is


def test_a_training_that_has_ended_is_not_repeated(tmp_path: Path) -> None:
    assert torch.equal(fitted(tmp_path), fitted(tmp_path, stop_at=0))


def test_progress_is_said_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fitted(tmp_path)
    assert ", 30/30, 0 s left" in capsys.readouterr().out


def test_the_rate_rises_stays_and_falls_to_nothing() -> None:
    rates = [PLAN.rate(step) for step in range(PLAN.num_steps)]
    assert rates[:3] == pytest.approx([0.025, 0.05, 0.075])
    assert rates[3:16] == [0.1] * 13
    assert rates[15:] == sorted(rates[15:], reverse=True)
    assert rates[-1] < 0.002


def test_latents_are_normal_after_scaling_and_pictures_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vae, "_NUM_MEASURED", 1)
    monkeypatch.setattr(vae, "Drawn", FewDrawn)
    torch.manual_seed(0)
    found = AutoencoderKL(**architecture.config()["vae"]).eval()
    torch.nn.init.normal_(found.quant_conv.bias)
    studio = Studio(tmp_path, torch.device("cpu"), seed=0)
    ((_, pixels),) = studio.batches(vae.Drawn(0, "measured"), 0, 1)
    pictures = vae.tensor(pixels)
    with torch.inference_mode():
        before = found.encode(pictures).latent_dist
        through = found.decode(before.mean).sample
        vae._normalise(found, studio)
        after = found.encode(pictures).latent_dist
        assert torch.allclose(found.decode(after.mean).sample, through, atol=1e-4)
    scaled = after.mean * found.config.scaling_factor
    assert scaled.mean((0, 2, 3)).abs().max() < 1e-3
    assert (scaled.std((0, 2, 3)) - 1).abs().max() < 1e-3
    # What chance adds to a latent has grown as the latent has.
    growth = after.mean.std((0, 2, 3)) / before.mean.std((0, 2, 3))
    assert torch.allclose(after.std, before.std * growth[:, None, None], rtol=1e-3)


@pytest.mark.slow
def test_the_command_writes_a_checkpoint_that_the_worker_loads_and_a_page_of_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "models" / "small.safetensors"
    for part, name, value in (
        (vae, "_BATCH", 4),
        (vae, "_DECODER_BATCH", 4),
        (vae, "_NUM_MEASURED", 1),
        (vae, "Drawn", FewDrawn),
        (denoiser, "_BATCH", 4),
        (denoiser, "_NUM_PICTURES", 1),
        (denoiser, "Drawn", FewDrawn),
        (report, "questions", partial(exam.questions, 4)),
    ):
        monkeypatch.setattr(part, name, value)
    monkeypatch.setattr(sys, "argv", ["demo_model", "--out", str(out), "--scale", "0.001", "--threads", "1"])
    command.main()
    assert load(as_cached(out), None, "cpu").unet.config.cross_attention_dim == 64
    assert {path.name for path in out.parent.iterdir()} == {"small.safetensors", "small.png"}
    said = capsys.readouterr().out
    assert "4 plain" in said
    assert "4 dressed up" in said
