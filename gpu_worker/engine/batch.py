"""Who takes the next tick on the GPU. Plain Python without torch: it knows names of runs, nothing of models.

A tick is one UNet call for runs of one group (the same UNet and latent size). Groups share the GPU in time slices of
GPU-seconds, those with a run that somebody waits for first; within a group, runs are admitted in that order and in
order of arrival for as long as their pixels fit the bound. A run is placed when it wants a UNet call, takes part in
ticks from then on, and is removed when it wants something else or has ended. One that wants another UNet in the middle
changes its group.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from gpu_worker.engine.bounds import Bound

R = TypeVar("R", bound=Hashable)

# A group that has waited for so long while urgent ones ticked has a slice between them.
_MAX_WAIT_SECONDS = 10.0


@dataclass(frozen=True)
class _Place:
    num_pixels: int
    is_urgent: bool


@dataclass
class _Group(Generic[R]):
    """Runs in order of arrival, the GPU time that the group has had, and all groups' when it last had a tick."""

    bound: Bound
    spent_seconds: float
    served_at: float
    runs: dict[R, _Place] = field(default_factory=dict)

    @property
    def is_urgent(self) -> bool:
        return any(place.is_urgent for place in self.runs.values())

    @property
    def is_full(self) -> bool:
        """Whether a tick has no place for another run of this size."""
        pixels = [place.num_pixels for place in self.runs.values()]
        return sum(pixels) + min(pixels) > self.bound.pixels

    def admitted(self) -> list[R]:
        """The longest prefix that fits, so that a large run is not overtaken for ever."""
        admitted: list[R] = []
        total = 0
        for run, place in sorted(self.runs.items(), key=lambda item: not item[1].is_urgent):
            total += place.num_pixels
            if admitted and total > self.bound.pixels:
                break
            admitted.append(run)
        return admitted


class Batch(Generic[R]):
    """Belongs to one thread. A group's bound limits a tick's rows x pixels; a run that is larger still runs, alone."""

    def __init__(self, slice_seconds: float = 0.1) -> None:
        self._slice_seconds = slice_seconds
        self._slice_left_seconds = 0.0
        self._spent_seconds = 0.0
        self._groups: dict[Hashable, _Group[R]] = {}
        # The group of the last tick.
        self.current: Hashable = None

    def __len__(self) -> int:
        return sum(len(group.runs) for group in self._groups.values())

    def __contains__(self, run: R) -> bool:
        return any(run in group.runs for group in self._groups.values())

    @property
    def is_full(self) -> bool:
        """Whether a group has no place in its next tick for another run."""
        return any(group.is_full for group in self._groups.values())

    def place(
        self,
        run: R,
        group: Hashable,
        num_pixels: int,
        bound: Bound,
        exclusive: bool = False,
        is_urgent: bool = False,
    ) -> None:
        """Puts a run at the end of the group, if it is not there already. An exclusive run is a group of its own: it
        never shares a tick."""
        key = (group, run) if exclusive else (group,)
        if key in self._groups and run in self._groups[key].runs:
            return
        self.remove(run)
        if key not in self._groups:
            # A new group is owed nothing for the time before it came.
            spent = min((other.spent_seconds for other in self._groups.values()), default=0.0)
            self._groups[key] = _Group(bound, spent, self._spent_seconds)
        if is_urgent and not (self.current in self._groups and self._groups[self.current].is_urgent):
            self._slice_left_seconds = 0.0
        self._groups[key].runs[run] = _Place(num_pixels, is_urgent)

    def remove(self, run: R) -> bool:
        """Forgets a run; False if it is not here."""
        for key, group in self._groups.items():
            if group.runs.pop(run, None) is not None:
                if not group.runs:
                    del self._groups[key]
                return True
        return False

    def next(self) -> list[R]:
        """The runs of the next tick, none if there is nothing to do: the slice goes on, or the group that has had the
        least time begins one."""
        if not self._groups:
            return []
        if self.current not in self._groups or self._slice_left_seconds <= 0:
            self.current = min(self._groups, key=self._rank)
            self._slice_left_seconds = self._slice_seconds
        group = self._groups[self.current]
        group.served_at = self._spent_seconds
        return group.admitted()

    def charge(self, group: Hashable, seconds: float) -> None:
        """Charges the group of a tick, which was `current` then."""
        self._spent_seconds += seconds
        if group == self.current:
            self._slice_left_seconds -= seconds
            if group in self._groups:
                self._groups[group].served_at = self._spent_seconds
        if group in self._groups:
            self._groups[group].spent_seconds += seconds

    def _rank(self, key: Hashable) -> tuple[bool, bool, float]:
        group = self._groups[key]
        has_waited = self._spent_seconds - group.served_at > _MAX_WAIT_SECONDS
        return not has_waited, not group.is_urgent, group.spent_seconds
