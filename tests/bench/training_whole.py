"""Owns whole trainings of a tiny checkpoint, for the benchmarks: pictures, latents, steps, previews and files."""

from __future__ import annotations

import contextlib
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from gpu_worker.files.cache import CachedModel
from gpu_worker.models import tiny, weights
from gpu_worker.trainer import dataset, listening
from gpu_worker.trainer.listening import Stopped
from gpu_worker.trainer.loop import STATE, Loop
from gpu_worker.trainer.steps import precision
from services.common.payloads.training import check_training
from tests.bench.training_loops import CAPTION, KEYS
from tests.gpu_worker.trainer.small import SMALL, Notes


def rate_of_whole(num_warm_steps: int, num_steps: int) -> float:
    """Steps per second of a training on the CPU with batches of four at 64 pixels, curves for TensorBoard included."""
    with tempfile.TemporaryDirectory() as name:
        folder, clock = _school(Path(name), num_warm_steps + num_steps), _Clock()
        fields = {"resolution": "64,64", "train_batch_size": 4, "max_train_epochs": 1, "sample_every_n_epochs": 0}
        _loop(folder, "cpu", clock, KEYS | fields | {"logging_dir": str(folder / "logs")}).run()
    return num_steps / (clock.times[-1] - clock.times[-1 - num_steps])


def whole(device: str, mixed_precision: str, **keys: Any) -> dict[str, Any]:
    """A whole training of a tiny checkpoint on the device: pictures, latents, steps, previews, files, and going on
    after an epoch."""
    fields = SMALL | {
        "mixed_precision": mixed_precision, "max_train_epochs": 3, "enable_bucket": True, "min_bucket_reso": 32,
        "bucket_reso_steps": 32, "train_batch_size": 2, "flip_aug": True, "save_every_n_epochs": 1,
        "sample_every_n_epochs": 1, "save_precision": "fp16", "sample_prompts": ["a zog --s 4"], "noise_offset": 0.05,
        "min_snr_gamma": 5, "multires_noise_iterations": 3, "scale_weight_norms": 0.1,
    } | keys  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = _school(Path(name), 2)
        first, second = Notes(stop_after=7), Notes()
        with contextlib.suppress(Stopped):
            _loop(folder, device, first, fields).run()
        _loop(folder, device, second, fields).run(folder / "out" / STATE)
    return {
        "steps": [len(first.losses), len(second.losses)],
        "resumed_at": second.plans[0].first_step,
        "files": first.files + second.files,
        "previews": len(first.drawings) + len(second.drawings),
        "finite": all(torch.isfinite(torch.tensor(first.losses + second.losses)).tolist()),
        "lines": [line for line in second.lines if "preview" in line],
    }


class _Clock(Notes):
    """Remembers when each step was told."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def stepped(self, progress: listening.Progress) -> None:
        """See Listener."""
        super().stepped(progress)
        self.times.append(time.perf_counter())


def _school(folder: Path, num_repeats: int) -> Path:
    """A tiny checkpoint and four pictures in two sizes, with a caption each."""
    tiny.write(folder / "tiny.safetensors", 1)
    concept = folder / "data" / f"{num_repeats}_zog"
    concept.mkdir(parents=True)
    for index in range(4):
        picture = Image.new("RGB", (96 if index % 2 else 64, 64), (200, 60 * index, 40))
        picture.save(concept / f"{index}.png")
        (concept / f"{index}.txt").write_text(f"{CAPTION}, {index}")
    return folder


def _loop(folder: Path, device: str, notes: Notes, keys: dict[str, Any]) -> Loop:
    """A whole training in the folder of a school, which has not begun."""
    config = check_training({"train_data_dir": str(folder / "data")} | keys)
    path = folder / "tiny.safetensors"
    base = CachedModel("tiny", "Stable-diffusion", path.name, path, "0" * 64)
    models = weights.load(base, None, device, precision(config, device))
    models.stay()
    return Loop(config, models, base, dataset.read(config, notes.log), folder / "out", notes)
