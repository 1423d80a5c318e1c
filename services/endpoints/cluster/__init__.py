"""Owns the seam between the control loop and what runs workers: processes of this machine, or pods on Kubernetes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Pool:
    """What a cluster needs to know of an endpoint."""

    endpoint_id: str
    endpoint_name: str
    instance_type: str


@dataclass(frozen=True)
class PoolState:
    """What runs of a pool.

    `num_running` counts workers that exist, ready or not. `failure` says why the pool's workers do not start, when
    trying again is pointless.
    """

    num_running: int
    failure: str | None = None


class Cluster(Protocol):
    """Runs the workers of pools.

    Every method is idempotent, and none waits for a worker to start or to stop: what happens later is told by the
    callback that the implementation was made with.
    """

    async def has_secret(self, endpoint_id: str) -> bool:
        """Whether the secret of the endpoint's workers is in place."""
        ...

    async def save_secret(self, endpoint_id: str, secret: str) -> None:
        """Puts the secret where the endpoint's workers find it."""
        ...

    async def apply(self, pool: Pool, num_workers: int, live: Collection[str]) -> PoolState:
        """Starts what is missing and stops what is too many; `live` are the ids of workers that the queue sees."""
        ...

    async def forget(self, endpoint_id: str) -> None:
        """Removes what is left of a pool that has no workers any more: its secret, its logs."""
        ...

    async def remove_orphans(self, endpoint_ids: Collection[str]) -> None:
        """Removes what was made for endpoints other than these, whose rows are lost."""
        ...
