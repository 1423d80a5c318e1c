"""Owns the GPU: one thread that loads models and takes denoising steps. Nobody else calls a model.

The loop hands runs to the thread through a queue; the thread answers through `_post`, and that is the whole bridge.
torch and diffusers are imported in the thread, so that the worker is connected long before they are.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import structlog
from numpy.typing import NDArray

from gpu_worker.batch import Batch
from gpu_worker.cache import CachedModel
from gpu_worker.job import JobError, Txt2Img

if TYPE_CHECKING:
    from gpu_worker.weights import Models

log = structlog.get_logger()

INTERNAL = "an internal error occurred in the worker; its log has the details under this job's id"


@dataclass(frozen=True)
class Produced:
    """What the engine made: pixels of shape (height, width, 3) for each image, and where the time went."""

    images: list[NDArray[np.uint8]]
    load_seconds: float
    pipeline_seconds: float


@dataclass(eq=False)
class _Run:
    """A request on its way through the engine."""

    job_id: str
    request: Txt2Img
    files: list[CachedModel]
    on_started: Callable[[], None]
    on_step: Callable[[int], None]
    result: asyncio.Future[Produced]
    steps: Generator[int, None, list[NDArray[np.uint8]]] | None = None
    load_seconds: float = 0.0
    pipeline_seconds: float = 0.0


@dataclass(frozen=True)
class _Cancel:
    run: _Run


@dataclass
class EngineSettings:
    """Where and how the engine runs. `num_threads` of torch on the CPU; 0 is torch's own choice."""

    device: str = "auto"
    num_threads: int = 0
    max_resident_models: int = 2


@dataclass
class _Resident:
    """The models in memory, the least recently used first."""

    max_models: int
    models: OrderedDict[tuple[str, ...], Models] = field(default_factory=OrderedDict)

    def get(self, key: tuple[str, ...], load: Callable[[], Models]) -> Models:
        """The models under the key; loading evicts before it loads."""
        if key not in self.models:
            while len(self.models) >= self.max_models:
                self.models.popitem(last=False)
            self.models[key] = load()
        self.models.move_to_end(key)
        return self.models[key]


class Engine:
    """The GPU thread as the event loop sees it."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._commands: queue.SimpleQueue[_Run | _Cancel | None] = queue.SimpleQueue()
        self._batch: Batch[_Run] = Batch()
        self._resident = _Resident(settings.max_resident_models)
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._torch_device = ""
        # Such as `cpu` or `cuda: NVIDIA H100`; what was asked for until the engine is ready.
        self.device = settings.device
        self.warm_models: tuple[str, ...] = ()
        # Resolves when jobs can run; an exception when the device cannot be used.
        self.ready: asyncio.Future[None] = self._loop.create_future()

    def start(self) -> None:
        """Starts the thread, which imports torch first."""
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread after the step under way."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    async def run(
        self,
        job_id: str,
        request: Txt2Img,
        files: list[CachedModel],
        on_started: Callable[[], None],
        on_step: Callable[[int], None],
    ) -> Produced:
        """Runs a request; `on_step` hears how many of steps x images are done. Cancelling acts within a step, and
        returns when the engine has let go of the job.

        Raises:
            JobError: the models or the request cannot be run.
        """
        run = _Run(job_id, request, files, on_started, on_step, self._loop.create_future())
        # Not a loss where nobody waits any more: a cancelled job's error is retrieved here.
        run.result.add_done_callback(lambda result: result.cancelled() or result.exception())
        self._commands.put(run)
        try:
            return await asyncio.shield(run.result)
        except asyncio.CancelledError:
            self._commands.put(_Cancel(run))
            await asyncio.wait([run.result])
            raise

    def _post(self, call: Callable[..., None], *arguments: Any) -> None:
        """Calls something on the event loop, from the thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, *arguments)

    def _main(self) -> None:
        try:
            self._begin()
        except Exception as error:
            self._post(_settle, self.ready, error)
            return
        self._post(_settle, self.ready, None)
        while self._take_commands():
            run = self._batch.next()
            if run is not None:
                self._step(run)

    def _begin(self) -> None:
        from gpu_worker import weights  # noqa: PLC0415 - imports torch, which takes seconds

        self._torch_device, self.device = weights.use_device(self._settings.device, self._settings.num_threads)

    def _take_commands(self) -> bool:
        """Takes what the loop said, waiting for it when there is nothing to run. False: stop."""
        while not len(self._batch) or not self._commands.empty():
            command = self._commands.get()
            if command is None:
                return False
            if isinstance(command, _Run):
                self._batch.add(command)
            elif self._batch.remove(command.run):
                self._end(command.run, asyncio.CancelledError())
        return True

    def _step(self, run: _Run) -> None:
        """One step of a run: the first loads its models, the last settles its result."""
        import torch  # noqa: PLC0415

        from gpu_worker.fault import leave_if_device_failed  # noqa: PLC0415

        try:
            if run.steps is None:
                self._post(run.on_started)
                run.steps = self._start(run)
            began = time.monotonic()
            try:
                with torch.inference_mode():
                    num_done = next(run.steps)
                self._post(run.on_step, num_done)
            finally:
                run.pipeline_seconds += time.monotonic() - began
        except StopIteration as end:
            self._end(run, Produced(end.value, run.load_seconds, run.pipeline_seconds))
        except JobError as error:
            self._end(run, error)
        except torch.OutOfMemoryError:
            self._end(run, JobError("the GPU has not enough memory for this job"))
        except Exception as error:  # the job fails; the worker lives, unless it was the GPU that failed
            leave_if_device_failed(error, run.job_id)
            log.exception("job failed in the engine", job_id=run.job_id)
            self._end(run, JobError(INTERNAL))

    def _start(self, run: _Run) -> Generator[int, None, list[NDArray[np.uint8]]]:
        from gpu_worker import weights  # noqa: PLC0415
        from gpu_worker.tasks import txt2img  # noqa: PLC0415

        began = time.monotonic()
        base = next(file for file in run.files if file.type == "Stable-diffusion")
        vae = next((file for file in run.files if file.type == "VAE"), None)
        key = (base.key, vae.key) if vae else (base.key,)
        models = self._resident.get(key, lambda: weights.load(base, vae, self._torch_device))
        self.warm_models = tuple({name for names in self._resident.models for name in names})
        run.load_seconds = time.monotonic() - began
        return txt2img.generate(run.request, models)

    def _end(self, run: _Run, outcome: Produced | BaseException) -> None:
        self._batch.remove(run)
        if run.steps is not None:
            run.steps.close()
            run.steps = None  # with it go the latents
        self._post(_settle, run.result, outcome)


def _settle(future: asyncio.Future[Any], outcome: Any) -> None:
    if future.done():
        return
    if isinstance(outcome, asyncio.CancelledError):
        future.cancel()
    elif isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
