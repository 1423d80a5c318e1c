"""UNet calls as CUDA graphs: launched as one, where launching a thousand kernels would take longer than running them.

A graph is a call of a certain shape that reads and writes at fixed places. Calls come in any number of rows, so they
are padded to a few; what the rows beyond contain does not matter, as rows do not mix. A shape is captured when it comes
for the second time, or when there was no memory, much later. What cannot be captured is called as it is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog
import torch

from gpu_worker import devices
from gpu_worker.devices import Cpu, Replay

log = structlog.get_logger()

_LATENT_AREA = 64  # pixels per latent
# Rows that calls are padded to.
BUCKETS = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64)
# Rows x pixels above which the GPU takes longer than the launches, and padding costs more than it saves.
_MAX_PIXELS = 32 * 512 * 512
_MAX_GRAPHS = 32
_CAPTURED_AT_USE = 2
_TRIED_AGAIN_AFTER = 256  # uses, where there was no memory
_MAX_SEEN = 1024
# A capture keeps its memory, so that much more must be free.
_FREE_FACTOR = 3

# What calls of any number of rows have in common, and what tells calls apart.
Shape = tuple[tuple[int, ...], int]
Key = tuple[int, Shape]
# (x, timestep, text, added) → the UNet's output.
Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class _Graph:
    """A captured call: the tensors that it reads, its result, and what repeats it."""

    inputs: list[torch.Tensor]
    output: torch.Tensor
    replay: Replay


class Graphs:
    """The captured calls of one UNet, given as a function."""

    def __init__(self, forward: Forward, device: Cpu, bytes_per_pixel: float) -> None:
        self._forward = forward
        self._device = device
        self._bytes_per_pixel = bytes_per_pixel
        self._graphs: OrderedDict[Key, _Graph] = OrderedDict()
        self._seen: dict[Key, int] = {}
        self._refused: set[Key] = set()
        self._pool: Any = None
        self._fast: dict[Shape, Forward] = {}
        devices.may_be_cleared(self)

    def __len__(self) -> int:
        return len(self._graphs)

    def __call__(
        self, x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, added: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The UNet's output, of the rows of x."""
        num_rows, shape = bucket(len(x)), shape_of(x, text)
        key = num_rows, shape
        forward = self._fast.get(shape, self._forward) if len(x) > 1 else self._forward
        if num_rows * x.shape[2] * x.shape[3] * _LATENT_AREA > _MAX_PIXELS and forward is self._forward:
            return forward(x, timestep, text, added)
        inputs = [x, timestep, text, *added.values()]
        graph = self._graphs.get(key) or self._captured(key, forward, inputs, list(added))
        if graph is None:
            return self._forward(x, timestep, text, added)
        self._graphs.move_to_end(key)
        for place, given in zip(graph.inputs, inputs, strict=True):
            place[: len(x)].copy_(given)
        graph.replay()
        return graph.output[: len(x)].clone()

    def prepared(self, forward: Forward, shapes: set[Shape]) -> None:
        """Has calls of these shapes captured from another form of the UNet, which is ready for 2 rows and more."""
        self._fast = dict.fromkeys(shapes, forward)

    def clear(self) -> None:
        """Gives up all graphs, and with them their memory."""
        self._graphs.clear()
        self._seen.clear()

    def _captured(self, key: Key, forward: Forward, inputs: list[torch.Tensor], names: list[str]) -> _Graph | None:
        """The graph of a call that has come often enough, if there is memory for it."""
        num_rows = key[0]
        if len(self._seen) > _MAX_SEEN:
            self._seen.clear()
        self._seen[key] = self._seen.get(key, 0) + 1
        is_its_turn = self._seen[key] % _TRIED_AGAIN_AFTER == _CAPTURED_AT_USE
        if not is_its_turn or key in self._refused or not self._has_memory(num_rows, inputs[0]):
            return None
        if len(self._graphs) >= _MAX_GRAPHS:
            oldest, _ = self._graphs.popitem(last=False)
            self._seen.pop(oldest, None)
        if not self._graphs:
            self._pool = self._device.pool()  # one that was emptied cannot be used again
        places = [_padded(tensor, num_rows) for tensor in inputs]

        def call() -> torch.Tensor:
            x, timestep, text, *rest = places
            return forward(x, timestep, text, dict(zip(names, rest, strict=True)))

        try:
            replay, output = self._device.capture(call, self._pool)
        except torch.OutOfMemoryError:
            log.info("no memory for a CUDA graph", num_rows=num_rows)
            return None
        except RuntimeError as error:
            self._refused.add(key)
            log.warning("a UNet call cannot be captured as a CUDA graph", reason=str(error).partition("\n")[0])
            return None
        self._graphs[key] = graph = _Graph(places, output, replay)
        return graph

    def _has_memory(self, num_rows: int, x: torch.Tensor) -> bool:
        free = self._device.free_bytes()
        pixels = num_rows * x.shape[2] * x.shape[3] * _LATENT_AREA
        return free is None or free >= _FREE_FACTOR * self._bytes_per_pixel * pixels


def bucket(num_rows: int) -> int:
    """The number of rows that a call is padded to."""
    return next((rows for rows in BUCKETS if rows >= num_rows), num_rows)


def shape_of(x: torch.Tensor, text: torch.Tensor) -> Shape:
    """The shape of a row and how many tokens it reads."""
    return tuple(x.shape[1:]), text.shape[1]


def _padded(tensor: torch.Tensor, num_rows: int) -> torch.Tensor:
    """A place for so many rows of such a tensor."""
    place = tensor.new_zeros(num_rows, *tensor.shape[1:])
    place[: len(tensor)].copy_(tensor)
    return place
