"""Jobs through the engine's core, and how long things take on a device."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from gpu_worker import devices
from gpu_worker.engine.core import Core
from gpu_worker.engine.run import Produced, Run
from gpu_worker.engine.settings import EngineSettings
from gpu_worker.files.cache import CachedModel
from gpu_worker.models import weights
from services.common.payloads import Generation

Load = Callable[[CachedModel, CachedModel | None], weights.Models]


class Driver:
    """A core on this thread."""

    def __init__(self, device: str, settings: EngineSettings, load: Load | None = None) -> None:
        self.loaded = threading.Semaphore(0)
        self.device = devices.of(device)
        self.core = Core(self.device, settings, self.loaded.release, load)

    def start(self, request: Generation, model: CachedModel, outcomes: dict[str, Any]) -> None:
        """Adds a job; its outcome and the moment of its end come into `outcomes`."""
        name = f"job {len(outcomes)}"
        outcomes[name] = None

        def end(outcome: Any) -> None:
            outcomes[name] = (time.perf_counter(), outcome)

        self.core.add(Run(name, request, [model], lambda: None, lambda _: None, end))

    def work(self, outcomes: dict[str, Any]) -> None:
        """Until all have ended."""
        while any(outcome is None for outcome in outcomes.values()):
            self.core.work()
            if self.core.is_idle and any(outcome is None for outcome in outcomes.values()):
                self.loaded.acquire(timeout=0.05)

    def run(self, requests: list[Generation], models: list[CachedModel]) -> tuple[float, list[float], list[Produced]]:
        """Jobs that come at once: seconds until the last has its pixels, those of each, and what they made."""
        outcomes: dict[str, Any] = {}
        began = time.perf_counter()
        for request, model in zip(requests, models, strict=True):
            self.start(request, model, outcomes)
        self.work(outcomes)
        ends = [end - began for end, _ in outcomes.values()]
        for _, outcome in outcomes.values():
            if isinstance(outcome, BaseException):
                raise outcome
        return max(ends), ends, [outcome for _, outcome in outcomes.values()]

    def placed(self) -> Any:
        """The checkpoint that is on the device."""
        return self.core.here[0]


class Clock:
    """Counts the device's time in calls."""

    def __init__(self, device: devices.Cpu) -> None:
        self._device = device
        self._marks: list[tuple[Any, Any]] = []

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, counted."""

        def counted(*arguments: Any, **options: Any) -> Any:
            begin = self._device.mark()
            try:
                return call(*arguments, **options)
            finally:
                self._marks.append((begin, self._device.mark()))

        return counted

    def take(self) -> float:
        """Seconds since the last time."""
        total = sum(self._device.seconds(begin, end) for begin, end in self._marks)
        self._marks.clear()
        return total


def median_seconds(device: devices.Cpu, call: Callable[[], Any], repeats: int, warm: int = 2) -> float:
    """The device's time for a call."""
    for _ in range(warm):
        call()
    found = []
    for _ in range(repeats):
        begin = device.mark()
        call()
        found.append(device.seconds(begin, device.mark()))
    return statistics.median(found)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, by norms; NaN stays NaN."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
