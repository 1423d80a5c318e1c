"""What the real engine must draw: each job once more, alone, in this process."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpu_worker.devices import Cpu
from gpu_worker.engine.core import Core
from gpu_worker.engine.run import Produced, Run
from gpu_worker.engine.settings import EngineSettings
from gpu_worker.files.cache import CachedModel
from services.common.payloads import Generation
from tests.chaos.verdict import Pixels

_MAX_DIFFERENCE = 2  # of 255: company in a tick changes the last bits


class Reference:
    """The engine's core with the checkpoint of a run."""

    def __init__(self, checkpoint: Path) -> None:
        torch.set_num_threads(1)
        self._model = CachedModel("reference", "Stable-diffusion", checkpoint.name, checkpoint, "")
        self._loaded = threading.Event()
        self._core = Core(Cpu(), EngineSettings(), self._loaded.set)
        self._drawn: dict[str, list[Pixels]] = {}

    def is_right(self, request: Generation, index: int, pixels: Pixels) -> bool:
        """Whether the picture is, but for rounding, the one that the request gives. Prompts tell requests apart."""
        if request.prompt not in self._drawn:
            self._drawn[request.prompt] = self._draw(request)
        expected = self._drawn[request.prompt][index].astype(int)
        return pixels.shape == expected.shape and int(np.abs(pixels - expected).max()) <= _MAX_DIFFERENCE

    def _draw(self, request: Generation) -> list[Pixels]:
        outcomes: list[Any] = []
        self._core.add(Run("reference", request, [self._model], lambda: None, lambda _: None, outcomes.append))
        self._core.work()
        self._loaded.wait()
        while not outcomes:
            self._core.work()
        (outcome,) = outcomes
        if not isinstance(outcome, Produced):
            raise outcome
        return outcome.images
