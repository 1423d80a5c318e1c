"""Owns the control loop: rows say which pools and tasks should be, the loop makes it so.

It is level-triggered and idempotent: what woke it does not matter, it looks at everything again, and may be stopped at
any point. One replica at a time runs it, elected by a lock in the database. It wakes by NOTIFY (a row changed), by the
queue (a worker came or went), by the cluster (a process ended), and by a slow sweep that repeats what failed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from datetime import UTC, datetime

import structlog

from services.common.auth import Kind
from services.common.database import Database
from services.common.errors import EsdError, Unavailable
from services.common.tasks import heard
from services.endpoints.cluster import Autoscaling, Cluster, Pool, PoolStatus
from services.endpoints.peers import Identity, Queue
from services.endpoints.rows import CREATING, DELETING, DRAINING, FAILED, IN_SERVICE, REAL_TIME, UPDATING, Endpoint
from services.endpoints.scaling import Load, Scale, ScalingPolicy, decide, needed_workers, seconds_until_due
from services.endpoints.store import CHANGED, EndpointStore
from services.endpoints.task_control import TaskControl

log = structlog.get_logger()

_SWEEP_SECONDS = 5.0
_RETRY_SECONDS = 0.5
_WITHOUT_WORKERS = (DELETING, FAILED, DRAINING)


class ControlLoop:
    """Keeps every endpoint as its row says. `wake` is shared with the cluster, which sets it when something happens."""

    def __init__(
        self,
        store: EndpointStore,
        database: Database,
        identity: Identity,
        queue: Queue,
        cluster: Cluster,
        tasks: TaskControl,
        wake: asyncio.Event,
        policy: ScalingPolicy,
        scaled_by_cluster: bool = False,
    ) -> None:
        self._store = store
        self._database = database
        self._identity = identity
        self._queue = queue
        self._cluster = cluster
        self._tasks = tasks
        self._wake = wake
        self._policy = policy
        self._scaled_by_cluster = scaled_by_cluster
        self._loads: dict[str, Load] | None = None  # None until the queue has told
        self._obstacles: dict[str, set[str]] = {}  # by endpoint: those of its workers that its events have told

    async def run(self) -> None:
        """Runs until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._database.listen([CHANGED], self._on_notify))
            group.create_task(self._watch_queue())
            group.create_task(self._lead())

    async def _on_notify(self, channel: str, payload: str) -> None:
        self._wake.set()

    async def _watch_queue(self) -> None:
        while True:
            try:
                async for loads in self._queue.watch_pools():
                    self.hear(loads)
            except EsdError as error:
                log.warning("the queue is not watched", error=str(error))
            await asyncio.sleep(_RETRY_SECONDS)  # after a stream has ended: who refuses is not to be flooded

    def hear(self, loads: dict[str, Load]) -> None:
        """Takes what the queue tells of all endpoints."""
        if loads != self._loads:
            self._loads = loads
            self._wake.set()

    async def _lead(self) -> None:
        while True:
            try:
                async with self._store.leadership() as confirm:
                    log.info("this process runs the control loop")
                    await self._reconcile_forever(confirm)
            except Unavailable as error:
                log.warning("the control loop pauses", error=str(error))
                await asyncio.sleep(_RETRY_SECONDS)  # nothing tells when a database that is down comes back

    async def _reconcile_forever(self, confirm: Callable[[], Awaitable[None]]) -> None:
        # Before the first round, since only rounds make anything: what has no row now is nobody's.
        owner_ids = [endpoint.id for endpoint in await self._store.get_all()] + await self._tasks.owner_ids()
        await self._cluster.remove_orphans(owner_ids)
        while True:
            await confirm()
            seconds = await self.reconcile()
            await heard(self._wake, seconds)  # else the sweep, or the time of a pool or task has come

    async def reconcile(self) -> float:
        """Looks at every endpoint and task once and does what is to be done now; answers how long it may rest."""
        endpoints = await self._store.get_all()
        await asyncio.gather(*(self._reconcile_safely(endpoint) for endpoint in endpoints))
        deadline = await self._tasks.reconcile()
        now = datetime.now(UTC)
        due = [seconds_until_due(row.scale, now, self._policy) for row in endpoints if row.autoscaling]
        if deadline is not None:
            due.append(max(0.0, (deadline - now).total_seconds()))
        return min([_SWEEP_SECONDS, *(seconds for seconds in due if seconds is not None)])

    async def _reconcile_safely(self, endpoint: Endpoint) -> None:
        """One endpoint's trouble is not the others'; the sweep tries again."""
        try:
            await self._reconcile_endpoint(endpoint)
        except EsdError as error:
            log.warning("an endpoint waits", endpoint=endpoint.name, error=str(error))
        except Exception:
            log.exception("an endpoint cannot be reconciled", endpoint=endpoint.name)

    async def _reconcile_endpoint(self, endpoint: Endpoint) -> None:
        load = (self._loads or {}).get(endpoint.id, Load())
        if not endpoint.are_pins_told:
            await self._queue.pin_models(endpoint.id, endpoint.pinned)
            await self._store.set_pins_told(endpoint)
        autoscaling = self._autoscaling(endpoint)
        if self._loads is not None and autoscaling is None:
            await self._rescale(endpoint, load)
        num_workers = 0 if endpoint.status in _WITHOUT_WORKERS else endpoint.num_workers
        if (num_workers or autoscaling) and not await self._cluster.has_secret(endpoint.id):
            secret = await self._identity.create_secret(Kind.WORKER, endpoint.id)
            await self._cluster.save_secret(endpoint.id, secret)
        pool = Pool(endpoint.id, endpoint.name, endpoint.instance_type, autoscaling)
        status = await self._cluster.apply(pool, num_workers, load.worker_ids)
        if autoscaling and status.num_wanted is not None:
            await self._take_scale(endpoint, Scale(status.num_wanted), "the cluster decided so")
        await self._tell_obstacle(endpoint, status.obstacle)
        if endpoint.status == DELETING:
            if status.num_running == 0:
                await self._clean_up(endpoint, load)
        elif endpoint.status == FAILED:
            await self._retire_failed(endpoint, endpoint.error or "")
        elif status.failure:
            log.error("an endpoint failed", endpoint=endpoint.name, error=status.failure)
            await self._store.set_failed(endpoint.id, status.failure)
            await self._retire_failed(endpoint, status.failure)
            self._wake.set()  # stop its other workers
        elif self._loads is not None:
            await self._observe(endpoint, load, status)

    def _autoscaling(self, endpoint: Endpoint) -> Autoscaling | None:
        """How an endpoint follows its load where that is the cluster's affair."""
        if not self._scaled_by_cluster or not _follows_load(endpoint):
            return None
        target = self._policy.target(endpoint.type == REAL_TIME)
        return Autoscaling(endpoint.num_min, endpoint.num_max, target, self._policy)

    async def _rescale(self, endpoint: Endpoint, load: Load) -> None:
        """Decides how many workers an endpoint that follows its load should have."""
        if not _follows_load(endpoint):
            return
        num_needed = needed_workers(load, endpoint.type == REAL_TIME, self._policy)
        bounds = endpoint.num_min, endpoint.num_max
        scale = decide(endpoint.scale, num_needed, *bounds, datetime.now(UTC), self._policy)
        await self._take_scale(endpoint, scale, _why(load, num_needed, bounds))

    async def _take_scale(self, endpoint: Endpoint, scale: Scale, reason: str) -> None:
        """Remembers what was decided, if it is new."""
        if scale == endpoint.scale:
            return
        if not await self._store.set_scale(endpoint, scale, reason):
            self._wake.set()  # somebody changed it meanwhile: look again
            return
        if scale.num_workers != endpoint.num_workers:
            log.info("a pool is scaled", endpoint=endpoint.name, before=endpoint.num_workers, now=scale.num_workers)
        endpoint.sqlmodel_update(asdict(scale))

    async def _observe(self, endpoint: Endpoint, load: Load, status: PoolStatus) -> None:
        """Writes down what the queue sees of the workers."""
        num_live = len(load.worker_ids)
        if num_live != endpoint.num_live:
            await self._store.set_num_live(endpoint.id, num_live)
        has_arrived = num_live == status.num_running == endpoint.num_workers
        if (num_live and endpoint.status == CREATING) or (has_arrived and endpoint.status == UPDATING):
            await self._store.set_in_service(endpoint.id, datetime.now(UTC))
            log.info("an endpoint is in service", endpoint=endpoint.name)

    async def _tell_obstacle(self, endpoint: Endpoint, obstacle: str) -> None:
        """Tells each of what workers wait for once, until none waits any more: a cluster may say two in turn."""
        if not obstacle:
            self._obstacles.pop(endpoint.id, None)
        elif obstacle not in (told := self._obstacles.setdefault(endpoint.id, set())):
            log.warning("a worker waits", endpoint=endpoint.name, reason=obstacle)
            await self._store.tell_obstacle(endpoint.id, obstacle)
            told.add(obstacle)

    async def _retire_failed(self, endpoint: Endpoint, error: str) -> None:
        if not endpoint.is_retired:
            first_line = error.partition("\n")[0]
            await self._queue.retire_endpoint(endpoint.id, f"endpoint {endpoint.name} failed: {first_line}")
            await self._store.set_retired(endpoint.id)

    async def _clean_up(self, endpoint: Endpoint, load: Load) -> None:
        """Takes away what is left of a deleted endpoint whose workers are gone.

        A worker that was killed holds its jobs until the queue notices, so the endpoint is retired until none is left.
        """
        await self._queue.retire_endpoint(endpoint.id, f"endpoint {endpoint.name} was deleted")
        if load.num_jobs:
            return
        if endpoint.pinned:
            await self._queue.pin_models(endpoint.id, [])
        await self._identity.delete_secret(Kind.WORKER, endpoint.id)
        await self._cluster.forget(endpoint.id)
        await self._store.remove_endpoint(endpoint.id)
        log.info("an endpoint is gone", endpoint=endpoint.name)


def _follows_load(endpoint: Endpoint) -> bool:
    """Whether its number of workers follows its load; a new one gets its first before."""
    return endpoint.autoscaling and endpoint.status in (IN_SERVICE, UPDATING)


def _why(load: Load, num_needed: int, bounds: tuple[int, int]) -> str:
    """Why a pool is scaled, for its events."""
    work = "" if load.work_seconds is None else f", about {load.work_seconds:.0f} s of work"
    jobs = f"{load.num_queued} jobs wait and {load.num_running} run{work}"
    return f"{jobs}, which needs {num_needed} workers of {bounds[0]} to {bounds[1]}"
