"""What the GPU thread does: starts runs, ticks, gives runs turns for stages of their own. Nobody else calls a model.

A run's task is advanced to its next wish: a UNet call, which the batch arranges with those of other runs, or a turn for
a stage (encoding text, decoding a picture), which it gets between ticks.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import structlog
import torch

from gpu_worker import adapters, tasks, upscaling, weights
from gpu_worker.batch import Batch
from gpu_worker.cache import CachedModel
from gpu_worker.denoise import Evaluation, predict
from gpu_worker.fault import leave_if_device_failed
from gpu_worker.job import INTERNAL, JobError
from gpu_worker.preview import Previews
from gpu_worker.resident import Resident
from gpu_worker.run import Equipment, Produced, Run
from services.common.payloads.models import CONTROLNET, UPSCALER

log = structlog.get_logger()

NO_MEMORY = "the GPU has not enough memory for this job"
# Rows x pixels of a UNet call, until one does not fit: 16 rows of SDXL. On the CPU 4 of SD1.5; more gain nothing.
_MAX_ADAPTERS = 16
_MAX_PIXELS = {"cuda": 16 * 1024 * 1024, "cpu": 4 * 512 * 512}


class Core:
    """Belongs to one thread, but for `on_loaded`, which is called in another: work() has something to do again."""

    def __init__(
        self, device: str, max_resident_models: int, on_loaded: Callable[[], None], max_pixels: int | None = None
    ) -> None:
        self._device = device
        self._waiting: deque[Run] = deque()  # for their models
        self._stages: deque[Run] = deque()
        self._batch: Batch[Run] = Batch(max_pixels or _MAX_PIXELS[device])
        self._resident: Resident[weights.Models] = Resident(max_resident_models, on_loaded)
        self._previews = Previews()
        # LoRAs and embeddings, for the models that they were loaded for.
        self._additions: Resident[adapters.Adapter] = Resident(_MAX_ADAPTERS, on_loaded)
        self._upscalers: Resident[upscaling.Upscaler] = Resident(max_resident_models, on_loaded)
        # Each about half as large as a checkpoint.
        self._controlnets: Resident[adapters.Adapter] = Resident(max_resident_models, on_loaded)
        self._last_tick: torch.cuda.Event | None = None
        self._pinned: dict[tuple[str, ...], CachedModel] = {}

    @property
    def is_idle(self) -> bool:
        """Whether nothing can be done until a run comes or a load ends."""
        return not self._batch and not self._stages

    @property
    def max_pixels(self) -> int:
        """Rows x pixels that one UNet call may have now."""
        return self._batch.max_pixels

    @property
    def warm_models(self) -> tuple[str, ...]:
        """Keys of the files whose models are in memory."""
        return self._resident.keys

    def add(self, run: Run) -> None:
        """Takes a run; it ends with its `on_end`."""
        self._waiting.append(run)

    def pin(self, files: list[CachedModel]) -> None:
        """Loads these checkpoints when no run waits for room, and lets them make room last."""
        self._pinned = {(file.key,): file for file in files}
        self._resident.pinned = frozenset(self._pinned)

    def cancel(self, run: Run, reason: BaseException) -> None:
        """Ends a run wherever it is; nothing happens if it has ended."""
        if run in self._waiting or run in self._stages or run in self._batch:
            self._end(run, reason)

    def close(self) -> None:
        """Ends the threads that load and that draw previews."""
        self._resident.close()
        self._previews.close()
        self._additions.close()
        self._controlnets.close()
        self._upscalers.close()

    def work(self) -> None:
        """A tick, and about as much time for stages, so that neither waits long for the other."""
        self.start_waiting()
        began = time.monotonic()
        self._tick()
        until = 2 * time.monotonic() - began
        while self._stages:
            self._advance(self._stages.popleft())
            if time.monotonic() >= until:
                break
        self.start_waiting()

    def start_waiting(self) -> None:
        """Starts the runs whose models are here, and the loads there is room for, in order of arrival."""
        for run in list(self._waiting):
            try:
                for equipment in run.equipment:
                    self._take(equipment, run)
                self._take_upscalers(run)
            except Exception as error:
                self._fail(run, error)
                continue
            if run.equipment and run.models is None and run.equipment[0].key not in self._resident:
                return  # it waits for a place, which nobody behind it may take
            if not run.is_started:
                run.is_started = True
                run.on_started()
                run.lap()
            if run.is_here:
                run.load_seconds = run.lap()
                run.task = tasks.begin(run)
                self._waiting.remove(run)
                self._stages.append(run)
        if not self._waiting:
            self._load_pinned()

    def _load_pinned(self) -> None:
        for key, file in list(self._pinned.items()):
            failure = self._resident.keep(key, lambda: weights.load(file, None, self._device))  # noqa: B023
            if failure is not None:
                log.warning("a pinned checkpoint cannot be loaded", name=file.name, reason=str(failure))
                del self._pinned[key]

    def _take(self, equipment: Equipment, run: Run) -> None:
        """Takes what is in memory of a checkpoint's models and begins to load the rest. A second one comes after the
        first, and needs no place: two runs that had one each would wait for each other for ever."""
        first = run.equipment[0]
        if equipment is not first and first.models is None:
            return
        if equipment.models is None:
            base, vae = equipment.base, equipment.vae
            equipment.models = self._resident.take(
                equipment.key, lambda: weights.load(base, vae, self._device), may_exceed=equipment is not first
            )
        models = equipment.models
        if models is None:
            return
        if first.models is not None and models.family != first.models.family:
            equipment.additions.clear()  # they are made for the first
        for file in equipment.additions:
            if file not in equipment.adapters:
                found = self._home(file).take(
                    adapters.key(file, equipment.key),
                    lambda: adapters.load(file, models, equipment.base.name),  # noqa: B023
                    may_exceed=True,
                )
                if found is not None:
                    equipment.adapters[file] = found

    def _take_upscalers(self, run: Run) -> None:
        """Takes the upscalers that are in memory and begins to load the others."""
        for file in run.files:
            if file.type == UPSCALER and file not in run.upscalers:
                found = self._upscalers.take(
                    (file.key,),
                    lambda: upscaling.load(file, self._device),  # noqa: B023
                    may_exceed=True,
                )
                if found is not None:
                    run.upscalers[file] = found

    def _home(self, file: CachedModel) -> Resident[adapters.Adapter]:
        """Where an addition is kept."""
        return self._controlnets if file.type == CONTROLNET else self._additions

    def _tick(self) -> None:
        runs = self._batch.next()
        if not runs:
            return
        began = time.monotonic()
        self._evaluate(runs)
        self._keep_pace()
        self._batch.spent(time.monotonic() - began)

    def _keep_pace(self) -> None:
        """Lets the thread be one tick ahead of the GPU, not more: cancelling and time slices count in ticks."""
        if self._device == "cuda":
            tick = torch.cuda.Event()  # type: ignore[no-untyped-call]
            tick.record()
            if self._last_tick is not None:
                self._last_tick.synchronize()
            self._last_tick = tick

    def _evaluate(self, runs: list[Run]) -> None:
        """Fulfils the wishes of runs that share a UNet and a size. Their latents change only after the UNet's success,
        so a call can be tried again."""
        wishes = [run.wish for run in runs if run.wish is not None]
        max_rows = self._batch.max_rows(wishes[0].row_pixels)
        try:
            with torch.inference_mode():
                predictions = predict(wishes, max_rows)
        except torch.OutOfMemoryError:
            predictions = None
        except Exception as error:
            if len(runs) == 1:
                return self._fail(runs[0], error)
            for run in runs:  # only whose wish it was shall fail
                self._evaluate([run])
            return None
        if predictions is None:
            return self._shrink(runs, wishes)
        for run, prediction in zip(runs, predictions, strict=True):
            if run.audience is not None and run.audience.take():
                assert run.models is not None
                assert run.wish is not None
                self._previews.draw(run.models, run.wish, prediction, run.on_preview)
            self._advance(run, prediction)
        return None

    def _shrink(self, runs: list[Run], wishes: list[Evaluation]) -> None:
        """After a call that did not fit the memory: the next tick is half of it."""
        if self._device == "cuda":
            torch.cuda.empty_cache()
        num_rows = sum(wish.num_rows for wish in wishes)
        if not self._batch.shrink(num_rows, wishes[0].row_pixels):
            self._fail(runs[0], JobError(NO_MEMORY))
        log.warning("out of memory in a UNet call", num_rows=num_rows, max_pixels=self._batch.max_pixels)

    def _advance(self, run: Run, prediction: torch.Tensor | None = None) -> None:
        """Takes a task to its next wish or its end."""
        assert run.task is not None
        try:
            with torch.inference_mode():
                run.wish = run.task.send(prediction)
        except StopIteration as end:
            self._end(run, Produced(end.value, run.load_seconds, run.lap()))
        except Exception as error:
            self._fail(run, error)
        else:
            if run.wish is None:
                self._batch.remove(run)
                self._stages.append(run)
            else:
                pixels = run.wish.num_rows * run.wish.row_pixels
                self._batch.place(run, run.wish.group, pixels, run.is_exclusive)

    def _fail(self, run: Run, error: Exception) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            error = JobError(NO_MEMORY)
        elif not isinstance(error, JobError):
            leave_if_device_failed(error, run.job_id)
            log.error("job failed in the engine", job_id=run.job_id, exc_info=error)
            error = JobError(INTERNAL)
        self._end(run, error)

    def _end(self, run: Run, outcome: Produced | BaseException) -> None:
        self._batch.remove(run)
        for queue in (self._waiting, self._stages):
            if run in queue:
                queue.remove(run)
        for equipment in run.equipment:
            for file in equipment.adapters:
                self._home(file).give_back(adapters.key(file, equipment.key))
            if equipment.models is not None:
                self._resident.give_back(equipment.key)
            equipment.models, equipment.adapters = None, {}
        for file in run.upscalers:
            self._upscalers.give_back((file.key,))
        run.upscalers = {}
        run.task = run.wish = None  # with them go the latents
        run.on_end(outcome)
