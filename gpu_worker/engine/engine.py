"""The GPU thread as the event loop sees it.

The loop hands runs to the thread through a queue; the thread answers through `_post`, and that is the whole bridge.
torch and diffusers are imported in the thread, so that the worker is connected long before they are.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import structlog

from gpu_worker.audience import Audience
from gpu_worker.engine.importing import uncollected
from gpu_worker.engine.run import Produced, Run
from gpu_worker.engine.settings import EngineSettings
from gpu_worker.files.cache import CachedModel
from gpu_worker.pictures.canvas import Canvas
from services.common.payloads import Payload

if TYPE_CHECKING:
    from gpu_worker.engine.core import Core

log = structlog.get_logger()

_NUM_LOOKS = 10  # while nothing moves, before the engine is taken for stuck


@dataclass(frozen=True)
class _Cancel:
    run: Run


@dataclass(frozen=True)
class _Pin:
    files: list[CachedModel]


class _Signal(Enum):
    STOP = "stop"
    LOADED = "loaded"


class Engine:
    """Starts the thread, brings it runs and tells their ends."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._commands: queue.SimpleQueue[Run | _Cancel | _Pin | _Signal] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        # Such as `cuda: NVIDIA H100, float16`: all that may change a picture's last bits. What was asked for until the
        # engine is ready.
        self.device = settings.device
        # As of the last work of the thread: cache keys of the models in memory, and the bound of a UNet call.
        self.warm_models: tuple[str, ...] = ()
        self.max_pixels = 0
        self.on_warm: Callable[[], None] = lambda: None  # called when other models are in memory
        self._num_runs = 0  # here now
        self._num_turns = 0  # that the thread has ended
        self._watching: asyncio.Task[None] | None = None
        # Resolves when jobs can run; an exception when the device cannot be used.
        self.ready: asyncio.Future[None] = self._loop.create_future()

    def start(self) -> None:
        """Starts the thread, which imports torch first."""
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread after the tick under way."""
        self._commands.put(_Signal.STOP)
        if self._watching is not None:
            self._watching.cancel()
        await asyncio.to_thread(self._thread.join)

    async def run(
        self,
        job_id: str,
        request: Payload,
        files: list[CachedModel],
        on_started: Callable[[], None],
        on_step: Callable[[int], None],
        canvas: Canvas | None = None,
        audience: Audience | None = None,
        is_urgent: bool = False,
    ) -> Produced:
        """Runs a request; `on_step` hears how many of steps x images are done, the audience is shown previews. An
        urgent one goes before others.
        Cancelling acts within a step, and returns when the engine has let go of the job.

        Raises:
            JobError: the models or the request cannot be run. NoMemory: not now.
        """
        result: asyncio.Future[Produced] = self._loop.create_future()
        # Not a loss where nobody waits any more: a cancelled job's error is retrieved here.
        result.add_done_callback(lambda result: result.cancelled() or result.exception())
        run = Run(
            job_id,
            request,
            files,
            on_started=lambda: self._post(on_started),
            on_step=lambda num_done: self._post(on_step, num_done),
            on_end=lambda outcome: self._post(_settle, result, outcome),
            canvas=canvas or Canvas(),
            audience=audience,
            is_urgent=is_urgent,
            on_preview=lambda jpeg: self._post(audience.show, jpeg) if audience else None,
        )
        self._commands.put(run)
        self._num_runs += 1
        try:
            return await asyncio.shield(result)
        except asyncio.CancelledError:
            self._commands.put(_Cancel(run))
            await asyncio.wait([result])
            raise
        finally:
            self._num_runs -= 1

    def pin(self, files: list[CachedModel]) -> None:
        """Loads these checkpoints when there is room, and keeps them as long as no job needs it."""
        self._commands.put(_Pin(files))

    async def _watch(self, patience_seconds: float) -> None:
        """Ends the process when runs are here and nothing has moved for so long: a GPU may hang without an error. It is
        counted in looks, as a process that was stopped in between has not been stuck."""
        from gpu_worker.engine import fault  # noqa: PLC0415 - imports torch, which is here now

        num_looks, num_turns = 0, 0
        while num_looks < _NUM_LOOKS:
            await asyncio.sleep(patience_seconds / _NUM_LOOKS)
            has_moved = self._num_turns != num_turns or not self._num_runs
            num_looks, num_turns = 0 if has_moved else num_looks + 1, self._num_turns
        fault.leave_stuck(patience_seconds)

    def _be_watched(self, patience_seconds: float) -> None:
        self._watching = self._loop.create_task(self._watch(patience_seconds))

    def _post(self, call: Callable[..., None], *arguments: Any) -> None:
        """Calls something on the event loop, from the thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, *arguments)

    def _main(self) -> None:
        try:
            core = self._begin()
        except Exception as error:
            self._post(_settle, self.ready, error)
            return
        self._post(_settle, self.ready, None)
        from gpu_worker.engine import fault  # noqa: PLC0415 - imports torch, which is here now

        try:
            self._work(core)
        except Exception as error:
            fault.leave_broken(error)

    def _work(self, core: Core) -> None:
        while self._take_commands(core):
            core.work()
            self._num_turns += 1
            self.max_pixels = core.max_pixels
            if core.warm_models != self.warm_models:
                self.warm_models = core.warm_models
                self._post(self.on_warm)
        core.close()

    def _begin(self) -> Core:
        with uncollected():
            from gpu_worker import devices  # noqa: PLC0415 - import torch, which takes seconds
            from gpu_worker.engine import core  # noqa: PLC0415 - import torch, which takes seconds
            from gpu_worker.models import weights  # noqa: PLC0415 - import torch, which takes seconds

        settings = self._settings
        device, description = weights.use_device(settings.device, settings.num_threads)
        precision = str(weights.dtype_of(settings.precision, device)).removeprefix("torch.")
        its_device = devices.of(device)
        forms = settings.fast_forms if its_device.can_capture else ()
        if forms != settings.fast_forms:
            log.warning("the UNet has no fast form on this device", wanted=settings.fast_forms, device=device)
        self.device = ", ".join([description, precision, *forms])
        found = core.Core(its_device, settings, lambda: self._commands.put(_Signal.LOADED))
        if its_device.patience_seconds is not None:
            self._post(self._be_watched, its_device.patience_seconds)
        self.max_pixels = found.max_pixels
        return found

    def _take_commands(self, core: Core) -> bool:
        """Takes what the loop said, waiting for it when there is nothing to do. False: stop."""
        is_waiting = core.is_idle
        while is_waiting or not self._commands.empty():
            command = self._commands.get()
            is_waiting = False
            if command is _Signal.STOP:
                return False
            if isinstance(command, Run):
                core.add(command)
            elif isinstance(command, _Cancel):
                core.cancel(command.run, asyncio.CancelledError())
            elif isinstance(command, _Pin):
                core.pin(command.files)
        return True


def _settle(future: asyncio.Future[Any], outcome: Any) -> None:
    if future.done():
        return
    if isinstance(outcome, asyncio.CancelledError):
        future.cancel()
    elif isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
