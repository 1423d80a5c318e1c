"""Decides which GPU of this machine a worker or task gets, in plain functions of who has which now.

A worker shares a GPU with other workers where there are not enough for all. A task has its GPU for itself, since it
takes memory for hours. Who goes first is a setting: pools, and a task waits for a GPU that no worker wants; or tasks,
and workers finish what they run and leave a GPU to the task that waits for it.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path


@dataclass(frozen=True)
class Shares:
    """Who has the GPUs: one entry for each worker and task that runs, and how many more want one."""

    gpus: tuple[str, ...]
    workers: tuple[str | None, ...] = ()
    tasks: tuple[str | None, ...] = ()
    num_waiting_workers: int = 0
    num_waiting_tasks: int = 0
    tasks_first: bool = False

    def for_worker(self) -> str | None:
        """The GPU with the fewest workers, the first of those, which is no task's; None where all are tasks'."""
        kept = self.kept_for_tasks()
        return min(
            (gpu for gpu in self.gpus if gpu not in self.tasks and gpu not in kept), key=self._num_workers, default=None
        )

    def for_task(self) -> str | None:
        """A GPU that nobody has and that no worker is waiting for; None where there is none."""
        free = [gpu for gpu in self.gpus if gpu not in self.tasks and gpu not in self.workers]
        num_spare = len(free) - (0 if self.tasks_first else self.num_waiting_workers)
        return free[0] if num_spare > 0 else None

    def kept_for_tasks(self) -> list[str]:
        """The GPUs that workers leave, and do not take, because tasks that go first wait for them."""
        if not self.tasks_first:
            return []
        candidates = sorted((gpu for gpu in self.gpus if gpu not in self.tasks), key=self._num_workers)
        return candidates[: self.num_waiting_tasks]

    def _num_workers(self, gpu: str) -> int:
        return Counter(self.workers)[gpu]


def find_gpus() -> list[str]:
    """The GPUs of this machine, as CUDA_VISIBLE_DEVICES names them."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        # CUDA goes by what stands before the first that there cannot be, such as -1.
        named = (gpu.strip() for gpu in visible.split(","))
        return list(takewhile(lambda gpu: gpu and not gpu.startswith("-"), named))
    return [str(index) for index, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]
