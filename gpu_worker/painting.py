"""A request in the engine and its pictures: one run, or a few at once where an x/y/z plot asks for many."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from PIL import Image

from esd.worker.v1 import worker_pb2
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.run import Produced
from gpu_worker.files.cache import CachedModel
from gpu_worker.job import Job
from gpu_worker.pictures import grid
from gpu_worker.pictures.canvas import Canvas
from gpu_worker.pictures.infotext import Made
from services.common.payloads import Edit, Generation, used
from services.common.tasks import together

_MAX_RUNS = 4  # of a plot in the engine at once, so that others come in between
_PROGRESS_INTERVAL_SECONDS = 0.2


async def produced(
    engine: Engine, job: Job, request: Generation, files: Sequence[CachedModel], canvas: Canvas
) -> list[Produced]:
    """What the engine makes of a request, of each cell of a plot.

    Raises:
        JobError: one of them cannot be run; the others are given up.
    """
    cells = request.cells()
    progress = _Progress(job, sum(cell.total_steps * cell.num_painted for cell in cells))
    room = asyncio.Semaphore(_MAX_RUNS)

    async def run(index: int, cell: Generation) -> Produced:
        async with room:
            step = partial(progress.step, index)
            own = _own(cell, files)
            is_urgent = job.spec.is_real_time
            return await engine.run(job.id, cell, own, progress.started, step, canvas, job.audience, is_urgent)

    async with together() as group:
        runs = [group.create_task(run(index, cell)) for index, cell in enumerate(cells)]
    return [run.result() for run in runs]


async def enlarged(
    engine: Engine, job: Job, request: Edit, files: Sequence[CachedModel], images: Sequence[Image.Image]
) -> list[Image.Image]:
    """What the request's upscalers that are models make of its pictures; nothing where there are none.

    Raises:
        JobError: a model cannot be used.
    """
    progress = _Progress(job, len(request.upscalers) * len(images))
    if not request.upscalers:
        progress.started()
        return []
    await asyncio.shield(engine.ready)
    canvas = Canvas([np.asarray(image.convert("RGB")) for image in images])
    step, is_urgent = partial(progress.step, 0), job.spec.is_real_time
    run = await engine.run(job.id, request, list(files), progress.started, step, canvas, is_urgent=is_urgent)
    return [Image.fromarray(pixels) for pixels in run.images]


def pictures(
    request: Generation, files: Sequence[CachedModel], canvas: Canvas, made: Sequence[Produced]
) -> tuple[list[Image.Image], list[Made]]:
    """The pictures of the result: what was painted, or the grids of a plot, and behind those what ControlNet looked at;
    and the making of each that was painted."""
    painted, makings = [], []
    for cell, run in zip(request.cells(), made, strict=True):
        own = _own(cell, files)
        for index, pixels in enumerate(run.images):
            painted.append(Image.fromarray(canvas.finished(pixels, index % cell.batch_size)))
            makings.append(Made(cell, index, own))
    if request.plot is not None:
        painted = grid.drawn(request.plot, painted)
        grids = [replace(makings[0], plot=request.plot)] * request.plot.num_grids
        makings = (grids + makings)[: len(painted)]
    return [*painted, *(Image.fromarray(pixels) for pixels in canvas.maps(request))], makings


def _own(cell: Generation, files: Sequence[CachedModel]) -> list[CachedModel]:
    """Of the files of a job, those that one of its runs uses."""
    return [files[position] for position in used(cell, [(file.type, file.name) for file in files])]


class _Progress:
    """Tells a job's progress, not more often than anybody can see: the first step, the last, and some between."""

    def __init__(self, job: Job, num_steps: int) -> None:
        self._job = job
        self._num_steps = num_steps
        self._told_at = 0.0
        self._is_started = False
        self._done: dict[int, int] = {}

    def started(self) -> None:
        if not self._is_started:
            self._is_started = True
            self._job.emit(worker_pb2.JobEvent(started=worker_pb2.JobStarted()))

    def step(self, run: int, num_done: int) -> None:
        self._done[run] = num_done
        step = sum(self._done.values())
        now = time.monotonic()
        if now - self._told_at >= _PROGRESS_INTERVAL_SECONDS or step == self._num_steps:
            self._told_at = now
            progress = worker_pb2.JobProgress(step=step, num_steps=self._num_steps)
            self._job.emit(worker_pb2.JobEvent(progress=progress))
