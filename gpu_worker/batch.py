"""Who takes the next tick on the GPU. Plain Python without torch: it knows names of runs, nothing of models.

A tick is one UNet call for runs of one group (the same UNet and latent size). Groups share the GPU in time slices;
within a group, runs are admitted in order of arrival for as long as their pixels fit the bound. A run is placed when it
wants a UNet call, takes part in ticks from then on, and is removed when it wants something else or has ended. One that
wants another UNet in the middle changes its group.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

R = TypeVar("R", bound=Hashable)


@dataclass
class _Group(Generic[R]):
    """Runs in order of arrival with the pixels of a tick of each, and the GPU time that the group has had."""

    spent_seconds: float
    num_pixels: dict[R, int] = field(default_factory=dict)


class Batch(Generic[R]):
    """Belongs to one thread. `max_pixels` bounds a tick's rows x pixels; a run that is larger still runs, alone."""

    def __init__(self, max_pixels: int, slice_seconds: float = 0.1) -> None:
        self.max_pixels = max_pixels
        self._slice_seconds = slice_seconds
        self._slice_left_seconds = 0.0
        self._groups: dict[Hashable, _Group[R]] = {}
        self._current: Hashable = None

    def __len__(self) -> int:
        return sum(len(group.num_pixels) for group in self._groups.values())

    def __contains__(self, run: R) -> bool:
        return any(run in group.num_pixels for group in self._groups.values())

    def place(self, run: R, group: Hashable, num_pixels: int, exclusive: bool = False) -> None:
        """Puts a run at the end of the group, if it is not there already. An exclusive run is a group of its own: it
        never shares a tick."""
        key = (group, run) if exclusive else (group,)
        if key in self._groups and run in self._groups[key].num_pixels:
            return
        self.remove(run)
        if key not in self._groups:
            # A new group is owed nothing for the time before it came.
            self._groups[key] = _Group(min((other.spent_seconds for other in self._groups.values()), default=0.0))
        self._groups[key].num_pixels[run] = num_pixels

    def remove(self, run: R) -> bool:
        """Forgets a run; False if it is not here."""
        for key, group in self._groups.items():
            if group.num_pixels.pop(run, None) is not None:
                if not group.num_pixels:
                    del self._groups[key]
                return True
        return False

    def next(self) -> list[R]:
        """The runs of the next tick, none if there is nothing to do: the slice goes on, or the group that has had the
        least time begins one."""
        if not self._groups:
            return []
        if self._current not in self._groups or self._slice_left_seconds <= 0:
            self._current = min(self._groups, key=lambda key: self._groups[key].spent_seconds)
            self._slice_left_seconds = self._slice_seconds
        return self._admitted(self._groups[self._current].num_pixels)

    def spent(self, seconds: float) -> None:
        """Charges the group of the last tick."""
        self._slice_left_seconds -= seconds
        if self._current in self._groups:
            self._groups[self._current].spent_seconds += seconds

    def shrink(self, num_rows: int, row_pixels: int) -> bool:
        """Halves the bound below a tick of so many rows that did not fit the memory. False: it was a single row."""
        num_rows = min(num_rows, self.max_rows(row_pixels))
        if num_rows == 1:
            return False
        self.max_pixels = num_rows // 2 * row_pixels
        return True

    def max_rows(self, row_pixels: int) -> int:
        """How many rows of that size one UNet call may have."""
        return max(1, self.max_pixels // row_pixels)

    def _admitted(self, num_pixels: dict[R, int]) -> list[R]:
        """The longest prefix that fits, so that a large run is not overtaken for ever."""
        admitted: list[R] = []
        total = 0
        for run, pixels in num_pixels.items():
            total += pixels
            if admitted and total > self.max_pixels:
                break
            admitted.append(run)
        return admitted
