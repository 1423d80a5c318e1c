"""The weights of a checkpoint in one piece of memory: in the host's, from where it comes to the GPU in one copy, and on
the GPU while it is in use. What moves is the data of the parameters; modules, and whoever shares them, stay.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog
import torch

log = structlog.get_logger()

_ALIGNMENT = 256  # bytes, as CUDA's own allocations have


@dataclass(frozen=True)
class _Slot:
    """Where a parameter or buffer lies in the block."""

    tensor: torch.Tensor
    start: int
    is_channels_last: bool

    def within(self, block: torch.Tensor) -> torch.Tensor:
        """Its data in a block."""
        piece = block[self.start : self.start + self.tensor.nbytes].view(self.tensor.dtype)
        if not self.is_channels_last:
            return piece.view(self.tensor.shape)
        rows, channels, height, width = self.tensor.shape
        return piece.view(rows, height, width, channels).permute(0, 3, 1, 2)


class Block:
    """The tensors of some modules, for use on a device. Where they need not move they stay as they are."""

    def __init__(self, modules: Sequence[torch.nn.Module], device: torch.device, moves: bool) -> None:
        tensors = {id(tensor): tensor for module in modules for tensor in (*module.parameters(), *module.buffers())}
        self._device = device
        self._slots: list[_Slot] = []
        self._host: torch.Tensor | None = None
        self._unpin: Callable[[], object] = lambda: None  # once
        size = 0
        for tensor in tensors.values():
            is_channels_last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
            self._slots.append(_Slot(tensor, size, is_channels_last and not tensor.is_contiguous()))
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self.num_bytes = size
        if moves:
            self._host = self._packed(size)

    def enter(self) -> None:
        """Brings the tensors to the device. The caller waits for the copy."""
        if self._host is not None:
            block = torch.empty(self.num_bytes, dtype=torch.uint8, device=self._device)
            block.copy_(self._host, non_blocking=True)
            self._point_to(block)

    def leave(self) -> None:
        """Takes the tensors off the device, whose work must be done."""
        if self._host is not None:
            self._point_to(self._host)

    def forget(self) -> None:
        """Gives up the host's copy: what leaves the device then is gone."""
        self._unpin()
        self._host = None

    def _packed(self, size: int) -> torch.Tensor:
        host = torch.empty(size, dtype=torch.uint8)
        for slot in self._slots:
            slot.within(host).copy_(slot.tensor)
        self._point_to(host)
        if _pin(host):
            self._unpin = weakref.finalize(self, _unpin, host.data_ptr())
        return host

    def _point_to(self, block: torch.Tensor) -> None:
        for slot in self._slots:
            slot.tensor.data = slot.within(block)


def _pin(block: torch.Tensor) -> bool:
    """Locks memory into place, from where the GPU reads it several times as fast. torch's own pinned memory comes in
    powers of two."""
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if cudart.cudaHostRegister(block.data_ptr(), block.numel(), 0) == cudart.cudaError.success:
        return True
    log.warning("memory of a model cannot be locked into place, it moves to the GPU slowly", num_bytes=block.numel())
    return False


def _unpin(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
