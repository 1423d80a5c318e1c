"""Owns a tiny ESRGAN with random weights, as its authors' files have it."""

from pathlib import Path

import torch

from gpu_worker.models import upscaling


def write(path: Path, scale: int = 4, bias: float | None = None) -> None:
    """Writes the model; with a bias its last layer adds that."""
    upscaling._spandrel()
    from spandrel.architectures.ESRGAN import ESRGAN

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ESRGAN(num_filters=8, num_blocks=1, scale=scale)
    state = model.state_dict()
    if bias is not None:
        state[list(state)[-1]] = torch.full_like(state[list(state)[-1]], bias)
    torch.save({"params_ema": state}, path)
