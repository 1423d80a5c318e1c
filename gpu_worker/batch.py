"""Who runs next on the GPU. Plain Python without torch: it knows names of runs, nothing of models.

A run is added when its models and payload are here, is told from then on when it may take a denoising step, and is
removed when it has ended, for whatever reason.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

R = TypeVar("R")


class Batch(Generic[R]):
    """Runs in order of arrival, of which at most `max_running` take steps in turn. Belongs to one thread."""

    def __init__(self, max_running: int = 1) -> None:
        self._max_running = max_running
        self._ready: deque[R] = deque()
        self._running: deque[R] = deque()

    def __len__(self) -> int:
        return len(self._ready) + len(self._running)

    def add(self, run: R) -> None:
        """Puts a run at the end of the queue."""
        self._ready.append(run)

    def remove(self, run: R) -> bool:
        """Forgets a run that ended or was cancelled, waiting or not; False if it is not here any more."""
        for queue in (self._running, self._ready):
            if run in queue:
                queue.remove(run)
                return True
        return False

    def next(self) -> R | None:
        """The run whose step comes next: those that run take turns, and a free place goes to the longest wait."""
        while self._ready and len(self._running) < self._max_running:
            self._running.append(self._ready.popleft())
        if not self._running:
            return None
        self._running.rotate(-1)
        return self._running[-1]
