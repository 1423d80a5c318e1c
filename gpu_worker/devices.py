"""The device as the engine sees it, beyond torch's own calls: its time, its memory, and work beside that of the ticks.

A CPU has done its work when a call returns, and its memory is the operating system's affair. A GPU works through a
queue; what would wait for it, or take its memory for ever, is kept here.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch

Replay = Callable[[], None]
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_MODELS_SHARE = 0.6  # of the device's memory; the rest is for calls
_COPIES_SHARE = 0.4  # of the host's memory


class Sparing(Protocol):
    """Holds memory that it can do without."""

    def clear(self) -> None:
        """Gives it up."""


class Cpu:
    """The machine's own processor."""

    name = "cpu"
    # Rows x pixels of a UNet call: 4 of SD1.5; more gain nothing.
    max_pixels = 4 * 512 * 512
    # How many ticks the engine's thread may be ahead.
    ticks_ahead = 0
    can_capture = False
    # How long nothing may move in an engine that has runs; None: however long, as a processor is slow but never hangs.
    patience_seconds: float | None = None

    @property
    def model_bytes(self) -> int:
        """Memory for models, where no setting says it."""
        return host_bytes() // 2

    @property
    def copy_bytes(self) -> int:
        """Memory for copies of models in the host, where no setting says it: here they would be the models again."""
        return 0

    def mark(self) -> Any:
        """A moment in the device's work."""
        return time.monotonic()

    def seconds(self, begin: Any, end: Any) -> float:
        """The device's time between two marks; waits for the later one."""
        return float(end - begin)

    def free_bytes(self) -> int | None:
        """Memory that calls may use now; None where there is no telling."""
        return None

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """Does the call and says how much memory it took beside what was there."""
        call()
        return 0

    def synchronize(self) -> None:
        """Waits for all work."""

    def aside(self) -> AbstractContextManager[None]:
        """Within it, a thread's work is no part of the ticks' queue. It is done when the context ends."""
        return nullcontext()

    def repeatable(self) -> AbstractContextManager[None]:
        """Within it, the same call gives the same bits."""
        return nullcontext()

    def pool(self) -> Any:
        """Memory for captured calls that are repeated one after the other, never at once."""
        raise NotImplementedError

    def capture(self, call: Callable[[], torch.Tensor], pool: Any) -> tuple[Replay, torch.Tensor]:
        """The call as the device's own program (a CUDA graph): what repeats it, and where its result is then. What it
        reads must stay where it is."""
        raise NotImplementedError


class Cuda(Cpu):
    """An NVIDIA GPU: torch's current one."""

    name = "cuda"
    # 64 rows of SD1.5 or 16 of SDXL, if the memory is there: more only make everybody wait longer.
    max_pixels = 64 * 512 * 512
    ticks_ahead = 1
    can_capture = True
    # A load from a slow disk, or compiling, may take minutes.
    patience_seconds = 1800.0

    def __init__(self) -> None:
        self._aside: torch.cuda.Stream | None = None
        self._making = threading.Lock()  # checkpoints and additions are loaded in threads of their own
        self._capturing: torch.cuda.Stream | None = None

    @property
    def model_bytes(self) -> int:
        return int(torch.cuda.get_device_properties().total_memory * _MODELS_SHARE)

    @property
    def copy_bytes(self) -> int:
        return int(host_bytes() * _COPIES_SHARE)

    def mark(self) -> Any:
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    def free_bytes(self) -> int | None:
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info()[0])

    def peak_bytes(self, call: Callable[[], object]) -> int:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return int(torch.cuda.max_memory_allocated() - before)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    @contextmanager
    def aside(self) -> Iterator[None]:
        # One stream for all loads: what the allocator has from one goes to the next.
        with self._making:
            stream = self._aside = self._aside or torch.cuda.Stream()  # type: ignore[no-untyped-call]
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            stream.synchronize()

    @contextmanager
    def repeatable(self) -> Iterator[None]:
        before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        try:
            yield
        finally:
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before

    def pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def capture(self, call: Callable[[], torch.Tensor], pool: Any) -> tuple[Replay, torch.Tensor]:
        self._capturing = self._capturing or torch.cuda.Stream()  # type: ignore[no-untyped-call]
        before = torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        try:
            self._capturing.wait_stream(before)
            with torch.cuda.stream(self._capturing):
                call()  # so that libraries set themselves up, and compilers compile
            # Other threads load models and draw previews meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=self._capturing, capture_error_mode="thread_local"):
                output = call()
        finally:
            torch.cuda.set_stream(before)  # which a capture that fails does not bring back
        return graph.replay, output


# Whoever holds memory that others may need more.
_sparing: weakref.WeakSet[Any] = weakref.WeakSet()


def of(name: str) -> Cpu:
    """The device of that name."""
    return Cuda() if name == "cuda" else Cpu()


def may_be_cleared(holder: Sparing) -> None:
    """Has the holder give up its memory when there is too little."""
    _sparing.add(holder)


def make_memory() -> None:
    """After a call that did not fit: gives up what can be done without."""
    for holder in list(_sparing):
        holder.clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def host_bytes() -> int:
    """Memory of the machine, or of the container that this process is in."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.exists() else "max"
    return total if limit == "max" else min(total, int(limit))


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on the device. To a GPU it goes from pinned memory, in its turn, and nobody waits for it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def arriving(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Sends a tensor to the host without waiting for it; what is returned waits, and has it."""
    if tensor.device.type != "cuda":
        return lambda: tensor
    arrived = tensor.to("cpu", non_blocking=True)  # which is pinned then
    event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()

    def found() -> torch.Tensor:
        event.synchronize()
        return arrived

    return found
