"""Owns the seam between the control loop and what runs workers: processes of this machine, or pods on Kubernetes."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from services.endpoints.rows import Task, TaskState
from services.endpoints.scaling import ScalingPolicy

# Settings of workers, which this service hands on to them from its own environment, wherever they run.
WORKER_SETTINGS = (
    "ESD_LOG_LEVEL",
    "ESD_NUM_THREADS",
    "ESD_MODEL_BYTES",
    "ESD_COPY_BYTES",
    "ESD_PRECISION",
    "ESD_CUDA_GRAPHS",
    "ESD_COMPILE",
    "ESD_FP8",
)
MAX_FAILURES = 3  # of a worker, in a row before it reached the queue: then its pool is given up


@dataclass(frozen=True)
class Autoscaling:
    """How a pool follows its load where the cluster sees to that (KEDA): bounds, jobs for each worker, and times."""

    num_min: int
    num_max: int
    target: float
    policy: ScalingPolicy


@dataclass(frozen=True)
class Pool:
    """What a cluster needs to know of an endpoint. With `autoscaling` the cluster decides how many workers it has."""

    endpoint_id: str
    endpoint_name: str
    instance_type: str
    autoscaling: Autoscaling | None = None


@dataclass(frozen=True)
class PoolStatus:
    """What runs of a pool.

    `num_running` counts workers that exist, ready or not. `failure` says why the pool's workers do not start, when
    trying again is pointless, and `obstacle` what one of them waits for meanwhile, as a sentence. `num_wanted` is what
    the cluster has decided for a pool with autoscaling.
    """

    num_running: int
    failure: str | None = None
    num_wanted: int | None = None
    obstacle: str = ""


@dataclass(frozen=True)
class TaskStatus:
    """What became of a task so far, and what it waits for or why it failed."""

    state: TaskState
    num_attempts: int
    num_failed: int
    reason: str = ""

    @classmethod
    def of(cls, task: Task, state: TaskState, reason: str = "") -> TaskStatus:
        """The task in this state after the attempts that its row knows."""
        return cls(state, task.num_attempts, task.num_failed, reason)


def worker_settings() -> dict[str, str]:
    """Those of WORKER_SETTINGS that the environment has."""
    return {name: os.environ[name] for name in WORKER_SETTINGS if os.environ.get(name)}


class Cluster(Protocol):
    """Runs the workers of pools, and tasks. Both are owners of a secret, by their id.

    Every method is idempotent, and none waits for a process to start or to stop: what happens later is told by the
    callback that the implementation was made with.
    """

    async def has_secret(self, owner_id: str) -> bool:
        """Whether the owner's secret is in place."""
        ...

    async def save_secret(self, owner_id: str, secret: str) -> None:
        """Puts the secret where the owner's processes find it."""
        ...

    async def apply(self, pool: Pool, num_workers: int, live: Collection[str]) -> PoolStatus:
        """Starts what is missing and stops what is too many; `live` are the ids of workers that the queue sees."""
        ...

    async def apply_task(self, task: Task, should_run: bool) -> TaskStatus:
        """Begins the task when it is its turn, and again while it may; stops it when it should not run any more.

        It has stopped when the answer is not RUNNING.
        """
        ...

    async def forget(self, owner_id: str) -> None:
        """Removes what is left of a pool that has no workers, or a task that has ended: its secret, its logs."""
        ...

    async def remove_orphans(self, owner_ids: Collection[str]) -> None:
        """Removes what was made for owners other than these, whose rows are lost."""
        ...
