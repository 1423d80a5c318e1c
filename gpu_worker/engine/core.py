"""What the GPU thread does: starts runs, ticks, gives runs turns for stages of their own. Nobody else calls a model.

A run's task is advanced to its next wish: a UNet call, which the batch arranges with those of other runs, or a turn for
a stage (encoding text, decoding a picture), which it gets between ticks. A GPU does its work later than this thread
asks for it; what a tick or a stage took is what the device says when it has done it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import structlog
import torch

from gpu_worker import devices, tasks
from gpu_worker.devices import Cpu
from gpu_worker.engine.batch import Batch
from gpu_worker.engine.denoise import Evaluation, predict
from gpu_worker.engine.fault import leave_if_device_failed
from gpu_worker.engine.loading import Load, Loader
from gpu_worker.engine.placed import Placed
from gpu_worker.engine.preview import Previews
from gpu_worker.engine.run import Produced, Run
from gpu_worker.engine.settings import EngineSettings
from gpu_worker.files.cache import CachedModel
from gpu_worker.job import INTERNAL, JobError, NoMemory
from gpu_worker.models import adapters

log = structlog.get_logger()

NO_MEMORY = "the GPU has not enough memory for this job; smaller pictures, or fewer ControlNets, may fit"
# How long the first call waits for those that came together with its first run.
_GATHERING_SECONDS = 0.3
# Of what a stage took, how much counts at the next: costly ones (a picture) and cheap ones (its way home) alternate.
_MEMORY = 0.8


@dataclass(frozen=True)
class _Asked:
    """A tick of a group, or a stage by which a run begins or not, between two marks of the device."""

    begin: Any
    end: Any
    group: Hashable = None
    is_stage: bool = False
    is_beginning: bool = False


class Core:
    """Belongs to one thread, but for `on_loaded`, which is called in another: work() has something to do again."""

    def __init__(
        self, device: Cpu, settings: EngineSettings, on_loaded: Callable[[], None], load: Load | None = None
    ) -> None:
        self._device = device
        self._max_pixels = settings.max_pixels or device.max_pixels
        self._loader = Loader(device, settings, on_loaded, load)
        self._stages: deque[Run] = deque()
        self._batch: Batch[Run] = Batch()
        self._previews = Previews()
        # What the device may not have done yet.
        self._ahead: deque[_Asked] = deque()
        # On the device, as far as it is known: what the last tick took, and what stages took lately, those by which
        # runs begin (encoding) and others (decoding).
        self._tick_seconds = 0.0
        self._stage_seconds = {True: 0.0, False: 0.0}

    @property
    def is_idle(self) -> bool:
        """Whether nothing can be done until a run comes or a load ends."""
        return not self._batch and not self._stages

    @property
    def here(self) -> list[Placed]:
        """The checkpoints on the device."""
        return self._loader.here

    @property
    def max_pixels(self) -> int:
        """Rows x pixels that one UNet call may have now."""
        bounds = [placed.bound.pixels for placed in self.here]
        return min(bounds, default=self._max_pixels)

    @property
    def warm_models(self) -> tuple[str, ...]:
        """Keys of the files whose models are in memory."""
        return self._loader.keys

    def add(self, run: Run) -> None:
        """Takes a run; it ends with its `on_end`."""
        self._loader.add(run)

    def pin(self, files: list[CachedModel]) -> None:
        """Loads these checkpoints when no run waits for room, and lets them make room last."""
        self._loader.pin(files)

    def cancel(self, run: Run, reason: BaseException) -> None:
        """Ends a run wherever it is; nothing happens if it has ended."""
        if run in self._loader or run in self._stages or run in self._batch:
            self._end(run, reason)

    def close(self) -> None:
        """Ends the threads that load and that draw previews."""
        self._loader.close()
        self._previews.close()

    def work(self) -> None:
        """A tick, and about as much time for stages, so that neither waits long for the other."""
        self.start_waiting()
        if not self._batch:
            self._gather()
        seconds_left = self._tick_seconds if self._tick() else 0.0
        # One turn each: the next may wait for what the device makes of this one, after the tick that is asked of it.
        for _ in range(len(self._stages)):
            seconds_left -= self._take_turn(self._stages.popleft())
            if seconds_left <= 0:
                break
        self.start_waiting()

    def _gather(self) -> None:
        """Takes runs to their first wishes where nobody has one: who comes together ticks together from the first step
        on. A turn for each after each tick would lead them through as many ticks as they are more."""
        until = time.monotonic() + _GATHERING_SECONDS
        while time.monotonic() < until and not self._batch.is_full:
            run = next((run for run in self._stages if run.is_beginning), None)
            if run is None:
                break
            self._stages.remove(run)
            self._take_turn(run)

    def _take_turn(self, run: Run) -> float:
        """A stage of a run. Answers what it took in seconds: of this thread or, by what such stages took lately, of the
        device, whichever is more."""
        began, begin, is_beginning = time.monotonic(), self._device.mark(), run.is_beginning
        self._advance(run)
        if self._batch:  # else nobody waits for it
            self._ahead.append(_Asked(begin, self._device.mark(), is_stage=True, is_beginning=is_beginning))
        return max(time.monotonic() - began, self._stage_seconds[is_beginning])

    def start_waiting(self) -> None:
        """Starts the runs whose models are here."""
        for run, error in self._loader.arrived():
            if error is not None:
                self._fail(run, error)
            else:
                run.load_seconds = run.lap()
                run.task = tasks.begin(run)
                self._stages.append(run)

    def _tick(self) -> bool:
        """The next call. False: there is none."""
        runs = self._batch.next()
        if runs:
            begin = self._device.mark()
            self._evaluate(runs)
            self._ahead.append(_Asked(begin, self._device.mark(), self._batch.current))
        # The thread may be a little ahead of the device, not more: cancelling and time slices count in ticks.
        num_ticks = sum(not asked.is_stage for asked in self._ahead)
        while num_ticks > self._device.ticks_ahead:
            asked = self._ahead.popleft()
            seconds = self._device.seconds(asked.begin, asked.end)
            if asked.is_stage:
                before = self._stage_seconds[asked.is_beginning]
                self._stage_seconds[asked.is_beginning] = max(seconds, _MEMORY * before)
            else:
                num_ticks -= 1
                self._tick_seconds = seconds
                self._batch.charge(asked.group, seconds)
        return bool(runs)

    def _evaluate(self, runs: list[Run]) -> None:
        """Fulfils the wishes of runs that share a UNet and a size. Their latents change only after the UNet's success,
        so a call can be tried again."""
        placed, wishes = runs[0].placed, [run.wish for run in runs if run.wish is not None]
        try:
            with torch.inference_mode():
                predictions = self._predicted(placed, runs[0].is_exclusive, wishes)
        except torch.OutOfMemoryError:
            predictions = None
        except Exception as error:
            if len(runs) == 1:
                return self._fail(runs[0], error)
            for run in runs:  # only whose wish it was shall fail
                self._evaluate([run])
            return None
        if predictions is None:
            return self._shrink(placed, runs, wishes)
        placed.bound.fits(sum(wish.num_rows for wish in wishes), wishes[0].row_pixels)
        for run, prediction in zip(runs, predictions, strict=True):
            if run.audience is not None and run.audience.take():
                assert run.wish is not None
                self._previews.draw(placed.models, run.wish, prediction, run.on_preview)
            self._advance(run, prediction)
        return None

    def _predicted(self, placed: Placed, is_exclusive: bool, wishes: list[Evaluation]) -> list[torch.Tensor]:
        """An exclusive run has calls of a picture each, which nothing else changes: not the memory that is free, nor
        what was captured before."""
        if not is_exclusive:
            max_rows = placed.bound.max_rows(wishes[0].row_pixels)
            return predict(wishes, max_rows, placed.graphs)
        with self._device.repeatable():
            return predict(wishes, wishes[0].num_rows // len(wishes[0].x))

    def _shrink(self, placed: Placed, runs: list[Run], wishes: list[Evaluation]) -> None:
        """After a call that did not fit the memory: the next tick is without the graphs that held some of it or, when
        there are none or that was the answer to the last such call, half of it. A single row has what others can do
        without."""
        num_rows = sum(wish.num_rows for wish in wishes)
        has_graphs = any(other.graphs for other in self.here)
        placed.gave_up_graphs = has_graphs and not placed.gave_up_graphs
        has_hope = placed.gave_up_graphs or placed.bound.shrink(num_rows, wishes[0].row_pixels)
        if not has_hope and not self._loader.evict_unused():
            self._fail(runs[0], NoMemory(NO_MEMORY))
        devices.make_memory()
        log.warning("out of memory in a UNet call", num_rows=num_rows, max_pixels=placed.bound.pixels)

    def _begin_again(self, run: Run) -> None:
        """After a stage that did not fit the memory, with which its task has ended: once more, with all the memory
        that there is to be had. What is random in it comes out the same."""
        self._loader.evict_unused()
        devices.make_memory()
        log.warning("out of memory in a stage: the job begins again", job_id=run.job_id)
        self._batch.remove(run)
        run.is_second_try, run.has_ticked = True, False
        run.task, run.wish = tasks.begin(run), None
        self._stages.append(run)

    def _advance(self, run: Run, prediction: torch.Tensor | None = None) -> None:
        """Takes a task to its next wish or its end."""
        assert run.task is not None
        has_room = True
        try:
            with torch.inference_mode():
                run.wish = run.task.send(prediction)
        except torch.OutOfMemoryError as error:
            if run.is_second_try:
                return self._fail(run, error)
            has_room = False
        except StopIteration as end:
            unfit = [file for equipment in run.equipment[:1] for file in adapters.unfit(equipment.adapters)]
            self._end(run, Produced(end.value, run.load_seconds, run.lap(), run.is_inpainting, unfit))
        except Exception as error:
            self._fail(run, error)
        else:
            if run.wish is None:
                self._batch.remove(run)
                self._stages.append(run)
            else:
                run.has_ticked = True
                pixels, bound = run.wish.num_rows * run.wish.row_pixels, run.placed.bound
                self._batch.place(run, run.wish.group, pixels, bound, run.is_exclusive, run.is_urgent)
        if not has_room:  # here, where no traceback holds tensors any more
            self._begin_again(run)
        return None

    def _fail(self, run: Run, error: Exception) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            error = NoMemory(NO_MEMORY)
        elif not isinstance(error, JobError):
            leave_if_device_failed(error, run.job_id)
            log.error("job failed in the engine", job_id=run.job_id, exc_info=error)
            error = JobError(INTERNAL)
        self._end(run, error)

    def _end(self, run: Run, outcome: Produced | BaseException) -> None:
        self._batch.remove(run)
        if run in self._stages:
            self._stages.remove(run)
        self._loader.give_back(run)
        run.task = run.wish = None  # with them go the latents
        run.on_end(outcome)
