"""An engine that paints at once what follows from prompt and seed, so that whoever knows a job knows its picture."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_worker.engine.engine import EngineSettings
from gpu_worker.engine.run import Produced
from gpu_worker.files.cache import CachedModel
from services.common.payloads import Generation

SECONDS_PER_STEP = 0.05
_JOBS_AT_ONCE = 4
_TYPICAL_PIXELS = 64 * 64


def painted(request: Generation, index: int) -> NDArray[np.uint8]:
    """Picture `index` of a request: 8x8 colours from a hash of what was asked for, enlarged to its size."""
    asked = f"{request.prompt}\0{request.seed_of(index)}\0{request.steps}\0{index}"
    seed = int.from_bytes(hashlib.sha256(asked.encode()).digest())
    colours = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.repeat(np.repeat(colours, request.height // 8, axis=0), request.width // 8, axis=1)


class PaintingEngine:
    """Stands where `gpu_worker.engine.engine.Engine` does."""

    def __init__(self, settings: EngineSettings) -> None:
        self.device = "cpu"
        self.warm_models: tuple[str, ...] = ()
        self.max_pixels = 2 * _TYPICAL_PIXELS * _JOBS_AT_ONCE
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def start(self) -> None:
        """There is nothing to load."""
        self.ready.set_result(None)

    async def stop(self) -> None:
        """There is nothing to let go of."""

    async def run(
        self,
        job_id: str,
        request: Generation,
        files: list[CachedModel],
        on_started: Callable[[], None],
        on_step: Callable[[int], None],
        *_: Any,
        **__: Any,
    ) -> Produced:
        """Takes its time for each step, as an engine does, and can be cancelled between two."""
        on_started()
        for step in range(request.steps * request.num_images):
            await asyncio.sleep(SECONDS_PER_STEP)
            on_step(step + 1)
        self.warm_models = tuple(file.key for file in files[:1])
        images = [painted(request, index) for index in range(request.num_images)]
        return Produced(images, load_seconds=0.0, pipeline_seconds=request.steps * SECONDS_PER_STEP)
