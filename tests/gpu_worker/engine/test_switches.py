"""What stays in the process when checkpoints take turns for a long time: of models, and of memory."""

import gc
import weakref
from pathlib import Path
from typing import Any

import psutil
import pytest

from gpu_worker.models import tiny, weights
from tests.gpu_worker import tiny_lora
from tests.gpu_worker.conftest import as_cached
from tests.gpu_worker.driving import changed
from tests.gpu_worker.engine.test_core import REQUEST, Driven

NUM_CHECKPOINTS = 3
NUM_SWITCHES = 50


def used_bytes() -> int:
    """Memory that this process has for itself: no file that is mapped counts."""
    gc.collect()
    return int(psutil.Process().memory_full_info().uss)


@pytest.mark.slow
def test_fifty_switches_between_three_checkpoints_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for one of them, so each has to be read again whenever it comes; and a LoRA for each."""
    paths = [tmp_path / f"{seed}.safetensors" for seed in range(NUM_CHECKPOINTS)]
    for seed, path in enumerate(paths):
        tiny.write(path, seed=seed)
    style = tmp_path / "style.safetensors"
    tiny_lora.write(style)
    request = changed(REQUEST, prompt="a cat <lora:style>", steps=1)
    loaded: list[weakref.ref[Any]] = []
    load = weights.load

    def counted(*arguments: Any) -> weights.Models:
        models = load(*arguments)
        loaded.append(weakref.ref(models.unet))
        return models

    monkeypatch.setattr(weights, "load", counted)
    driven = Driven(paths[0], max_models=1)

    def switch(times: int) -> None:
        for _ in range(times):
            name = str(len(driven.ended))
            driven.add(name, request, paths[len(driven.ended) % NUM_CHECKPOINTS], as_cached(style, "Lora"))
            driven.until_ended(name)
            assert driven.pixels(name).shape == (1, 64, 64, 3)
            assert len(driven.core.here) == 1

    switch(2 * NUM_CHECKPOINTS)  # with which libraries and the allocator have what they keep
    before = used_bytes()
    switch(NUM_SWITCHES)
    growth = used_bytes() - before
    assert len(loaded) == 2 * NUM_CHECKPOINTS + NUM_SWITCHES
    assert sum(unet() is not None for unet in loaded) == 1
    assert growth < driven.core.here[0].num_bytes  # of the fifty that came, not even one is still here
    driven.core.close()
