"""What runs need in memory: who waits for what, which loads begin, and in which order.

Belongs to the engine's thread; the loads themselves have threads of their own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import structlog
import torch

from gpu_worker.devices import Cpu
from gpu_worker.engine.placed import Placed
from gpu_worker.engine.resident import Resident
from gpu_worker.engine.run import Equipment, Run
from gpu_worker.engine.settings import EngineSettings
from gpu_worker.files.cache import CachedModel
from gpu_worker.models import adapters, upscaling, weights
from gpu_worker.models.adapters import Loaded
from services.common.payloads.models import CONTROLNET, UPSCALER

log = structlog.get_logger()

_ADDITIONS_SHARE = 4  # of the memory for models

# Reads a checkpoint, with the VAE of another file.
Load = Callable[[CachedModel, CachedModel | None], weights.Models]


class Loader:
    """Brings runs their models. `on_loaded` is called in another thread: arrived() has something new to say."""

    def __init__(
        self, device: Cpu, settings: EngineSettings, on_loaded: Callable[[], None], load: Load | None = None
    ) -> None:
        self._device = device
        self._settings = settings
        dtype = weights.dtype_of(settings.precision, device.name)
        self._load = load or (lambda base, vae: weights.load(base, vae, device.name, dtype))
        self._waiting: deque[Run] = deque()
        model_bytes = settings.model_bytes or device.model_bytes
        copy_bytes = device.copy_bytes if settings.copy_bytes is None else settings.copy_bytes
        self._resident: Resident[Placed] = Resident(model_bytes, copy_bytes, on_loaded)
        # LoRAs and embeddings, for the models that they were loaded for; ControlNets and upscalers.
        self._additions: Resident[Loaded] = Resident(model_bytes // _ADDITIONS_SHARE, 0, on_loaded)
        # Most files are in half precision.
        self._bytes_per_file_byte = dtype.itemsize // 2
        self._pinned: dict[tuple[str, ...], CachedModel] = {}

    def __contains__(self, run: Run) -> bool:
        """Whether a run still waits."""
        return run in self._waiting

    @property
    def here(self) -> list[Placed]:
        """The checkpoints on the device."""
        return self._resident.here

    @property
    def keys(self) -> tuple[str, ...]:
        """Of the files whose models are in memory."""
        return self._resident.keys

    def add(self, run: Run) -> None:
        """Takes a run, which waits until it has arrived."""
        self._waiting.append(run)

    def pin(self, files: list[CachedModel]) -> None:
        """Loads these checkpoints when no run waits for room, and lets them make room last."""
        self._pinned = {(file.key,): file for file in files}
        self._resident.pinned = frozenset(self._pinned)

    def arrived(self) -> Iterator[tuple[Run, Exception | None]]:
        """The runs that wait no more, since all that they need is here, or with the reason why it never will be. Begins
        the loads there is room for, in order of arrival."""
        unheard = [(resident, resident.failures) for resident in (self._resident, self._additions)]
        yield from self._served()
        for resident, failures in unheard:
            resident.dismiss(failures)

    def give_back(self, run: Run) -> None:
        """Takes from a run what it has, wherever it is."""
        if run in self._waiting:
            self._waiting.remove(run)
        for equipment in run.equipment:
            for file in equipment.adapters:
                self._additions.give_back(_key_of(file, equipment))
            if equipment.placed is not None:
                self._resident.give_back(equipment.key)
            equipment.placed, equipment.adapters = None, {}
        for file in run.upscalers:
            self._additions.give_back((file.key,))
        run.upscalers = {}

    def evict_unused(self) -> bool:
        """Frees what nobody uses now; False: there was nothing."""
        return any([self._resident.evict_unused(), self._additions.evict_unused()])

    def close(self) -> None:
        """Waits for the loads on their way and ends their threads."""
        self._resident.close()
        self._additions.close()

    def _served(self) -> Iterator[tuple[Run, Exception | None]]:
        for run in sorted(self._waiting, key=lambda run: not run.is_urgent):
            try:
                for equipment in run.equipment:
                    self._take(equipment, run)
                self._take_upscalers(run)
            except torch.OutOfMemoryError as error:
                if not self._resident.evict_unused():
                    yield run, error
                continue
            except Exception as error:
                yield run, error
                continue
            if run.equipment and run.models is None and run.equipment[0].key not in self._resident:
                return  # it waits for a place, which nobody behind it may take
            if not run.is_started:
                run.is_started = True
                run.on_started()
                run.lap()
            if run.is_here:
                self._waiting.remove(run)
                yield run, None
        if not self._waiting:
            self._load_pinned()

    def _load_pinned(self) -> None:
        for key, file in list(self._pinned.items()):
            load = partial(self._placed, file, None)
            try:
                failure = self._resident.keep(key, load, self._num_bytes(file))
            except OSError as error:  # the file is gone
                failure = error
            if failure is not None:
                log.warning("a pinned checkpoint cannot be loaded", name=file.name, reason=str(failure))
                del self._pinned[key]

    def _take(self, equipment: Equipment, run: Run) -> None:
        """Takes what is in memory of a checkpoint's models and begins to load the rest. A second one comes after the
        first, and needs no place: two runs that had one each would wait for each other for ever."""
        first = run.equipment[0]
        if equipment is not first and first.placed is None:
            return
        if equipment.placed is None:
            base, vae = equipment.base, equipment.vae
            equipment.placed = self._resident.take(
                equipment.key,
                partial(self._placed, base, vae),
                self._num_bytes(base, vae),
                may_exceed=equipment is not first,
            )
            if equipment.placed is None:
                return
            self._settle(equipment.placed)
        models = equipment.placed.models
        if first.models is not None and models.family != first.models.family:
            equipment.additions.clear()  # they are made for the first
        for file in equipment.additions:
            if file not in equipment.adapters:
                load = partial(adapters.load, file, models, equipment.base.name)
                found = self._added(file, _key_of(file, equipment), load)
                if found is not None:
                    equipment.adapters[file] = found

    def _take_upscalers(self, run: Run) -> None:
        """Takes the upscalers that are in memory and begins to load the others."""
        for file in run.files:
            if file.type == UPSCALER and file not in run.upscalers:
                found = self._added(file, (file.key,), partial(upscaling.load, file, self._device.name))
                if found is not None:
                    run.upscalers[file] = found

    def _added(self, file: CachedModel, key: tuple[str, ...], load: Callable[[], Any]) -> Any:
        """What a file holds, in use until given back. None: it is not here yet."""
        num_bytes = file.path.stat().st_size

        def loaded() -> Loaded:
            with self._device.aside():
                return Loaded(load(), num_bytes, self._device.synchronize)

        found = self._additions.take(key, loaded, num_bytes, may_exceed=True)
        return found.content if found is not None else None

    def _num_bytes(self, *files: CachedModel | None) -> int:
        """What models are taken to need, before they are read."""
        return self._bytes_per_file_byte * sum(file.path.stat().st_size for file in files if file)

    def _placed(self, base: CachedModel, vae: CachedModel | None) -> Placed:
        return Placed(self._load(base, vae), self._device, self._settings)

    def _settle(self, placed: Placed) -> None:
        """Makes models ready for ticks that may just have come to the device, where less memory is free since then."""
        if not placed.is_settled:
            placed.settle()
            free_bytes = self._device.free_bytes()
            for other in self._resident.here:
                other.allow(free_bytes)


def _key_of(file: CachedModel, equipment: Equipment) -> tuple[str, ...]:
    """What names an addition in memory: it is made for a checkpoint or, if it is a ControlNet, for all of a family."""
    assert equipment.models is not None
    return (file.key, equipment.models.family) if file.type == CONTROLNET else (file.key, *equipment.key)
