"""What replicas tell each other of watched jobs, and how watched jobs stand in the queue, in PostgreSQL.

The table job_progress is UNLOGGED: it is a way, not a memory; after a crash of the database it is empty.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    Integer,
    Interval,
    LargeBinary,
    Select,
    Table,
    Uuid,
    any_,
    bindparam,
    delete,
    func,
    select,
)
from sqlalchemy.dialects.postgresql import insert

from services.common.database import Database, notify
from services.common.driver import Run
from services.inference.channels import JOBS_MOVED, JOBS_WATCHED
from services.inference.rows import JobProgress, Worker, now
from services.inference.table import JOB, QUEUED, by_place, recent_successes, totals

_NUM_IDS = 200  # in a notification, which ends at 8,000 bytes

_PROGRESS: Table = JobProgress.__table__  # type: ignore[attr-defined]
_WORKER: Table = Worker.__table__  # type: ignore[attr-defined]
_IDS: Any = any_(bindparam("ids", type_=ARRAY(Uuid)))
_JOBS_OF = select(JOB.c.lease_id, JOB.c.id).where(JOB.c.lease_id == _IDS)
_FETCH = select(_PROGRESS).where(_PROGRESS.c.job_id == _IDS)
_SWEEP = delete(_PROGRESS).where(_PROGRESS.c.update_time < func.clock_timestamp() - bindparam("age", type_=Interval))
_COLUMNS = {
    "job_id": Uuid,
    "lease_id": Uuid,
    "step": Integer,
    "num_steps": Integer,
    "preview": LargeBinary,
    "num_previews": Integer,
}
_TOLD = [name for name in _COLUMNS if name != "job_id"]  # fields of Progress too
_PUBLISH = insert(_PROGRESS).from_select(
    [*_COLUMNS, "update_time"],
    select(
        *(func.unnest(bindparam(name, type_=ARRAY(kind))) for name, kind in _COLUMNS.items()),
        func.clock_timestamp(),
    ),
)
_PUBLISH = _PUBLISH.on_conflict_do_update(
    index_elements=["job_id"],
    set_={name: _PUBLISH.excluded[name] for name in [*_TOLD, "update_time"]},
)


def _snapshots() -> Select[Any]:
    """How jobs stand, with their place in the queue of their endpoint and the cost that is before them."""
    endpoints = select(JOB.c.endpoint_id).where(JOB.c.id == _IDS, QUEUED)
    places: Any = {
        "partition_by": JOB.c.endpoint_id,
        "order_by": by_place(JOB),
    }
    queue = (
        select(
            JOB.c.id,
            func.row_number().over(**places).label("position"),
            func.sum(JOB.c.cost_seconds).over(**places, rows=(None, -1)).label("cost_ahead"),
        )
        .where(QUEUED, JOB.c.endpoint_id.in_(endpoints))
        .subquery()
    )
    shown = (JOB.c.id, JOB.c.endpoint_id, JOB.c.status, JOB.c.lease_id, JOB.c.is_running)
    return (
        select(*shown, queue.c.position, queue.c.cost_ahead)
        .outerjoin(queue, queue.c.id == JOB.c.id)
        .where(JOB.c.id == _IDS)
    )


_SNAPSHOTS = _snapshots()
_ENDPOINT: Any = bindparam("endpoint", type_=Uuid)
_FINISHED = totals(recent_successes(_ENDPOINT))
_NUM_WORKERS = select(func.count().label("number")).select_from(_WORKER).where(_WORKER.c.endpoint_id == _ENDPOINT)
_UNDER_LEASE = select(
    func.count().label("number"), func.coalesce(func.sum(JOB.c.cost_seconds), 0.0).label("cost")
).where(JOB.c.endpoint_id == _ENDPOINT, JOB.c.lease_id.is_not(None))


@dataclass(frozen=True)
class Progress:
    """How far a job is under a lease. `num_previews` tells one preview, a JPEG, from the next."""

    lease_id: UUID
    has_started: bool = False
    step: int = 0
    num_steps: int = 0
    preview: bytes = b""
    num_previews: int = 0


@dataclass(frozen=True)
class Snapshot:
    """A job as the database has it. `position` counts from 1 while it is queued; the estimate is None where nothing is
    known."""

    endpoint_id: UUID
    status: str
    lease_id: UUID | None
    is_running: bool
    position: int
    estimated_start_time: datetime | None

    @property
    def is_ended(self) -> bool:
        """Whether nothing more happens to the job."""
        return self.status in {"succeed", "failed"}


@dataclass(frozen=True)
class _Pace:
    """How an endpoint works its queue off: seconds for each unit of cost, over all that it does at once."""

    seconds_per_cost: float
    held_cost: float

    def start(self, cost_ahead: float) -> datetime:
        """When the job behind so much starts: those under way are half done, on average."""
        return now() + timedelta(seconds=self.seconds_per_cost * (cost_ahead + self.held_cost / 2))


class WatchStore:
    """One method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def jobs_of(self, leases: list[UUID]) -> dict[UUID, UUID]:
        """From each lease that is held to its job."""
        return {row["lease_id"]: row["id"] for row in await self._database.run(_JOBS_OF, ids=leases)}

    async def announce(self, replica: str, job_ids: Collection[UUID]) -> None:
        """Tells all replicas that these jobs are watched on this one."""
        await _notify_ids(self._database.run, JOBS_WATCHED, replica, job_ids)

    async def publish(self, replica: str, progresses: dict[UUID, Progress]) -> None:
        """Writes how far jobs are, and tells all replicas of it."""
        if not progresses:
            return
        rows = sorted(progresses.items())
        columns: dict[str, list[Any]] = {name: [getattr(told, name) for _, told in rows] for name in _TOLD}
        async with self._database.atomic() as run:
            await run(_PUBLISH, job_id=[job_id for job_id, _ in rows], **columns)
            await _notify_ids(run, JOBS_MOVED, replica, progresses)

    async def fetch(self, job_ids: Collection[UUID]) -> dict[UUID, Progress]:
        """How far jobs are that other replicas have written of."""
        rows = await self._database.run(_FETCH, ids=list(job_ids))
        return {row["job_id"]: Progress(has_started=True, **{name: row[name] for name in _TOLD}) for row in rows}

    async def sweep(self, age_seconds: float) -> None:
        """Removes what was written so long ago."""
        await self._database.run(_SWEEP, age=timedelta(seconds=age_seconds))

    async def snapshots(self, job_ids: Collection[UUID]) -> dict[UUID, Snapshot]:
        """How those of the jobs stand that exist."""
        async with self._database.atomic() as run:
            rows = await run(_SNAPSHOTS, ids=list(job_ids))
            queued_at = {row["endpoint_id"] for row in rows if row["position"] is not None}
            paces = {endpoint_id: await _pace(run, endpoint_id) for endpoint_id in queued_at}
        found = {}
        for row in rows:
            pace = paces.get(row["endpoint_id"]) if row["position"] is not None else None
            estimate = pace.start(row["cost_ahead"] or 0.0) if pace is not None else None
            found[row["id"]] = Snapshot(
                row["endpoint_id"], row["status"], row["lease_id"], row["is_running"], row["position"] or 0, estimate
            )
        return found


async def _pace(run: Run, endpoint_id: UUID) -> _Pace | None:
    """How fast an endpoint is now; None where no worker is, or none has finished a job."""
    (finished,) = await run(_FINISHED, endpoint=endpoint_id)
    (workers,) = await run(_NUM_WORKERS, endpoint=endpoint_id)
    if not workers["number"] or not finished["finished_cost"]:
        return None
    (held,) = await run(_UNDER_LEASE, endpoint=endpoint_id)
    # With a queue behind them the workers do as many jobs at once as they ever do.
    at_once = max(held["number"], workers["number"])
    return _Pace(float(finished["finished_seconds"]) / finished["finished_cost"] / at_once, held["cost"])


async def _notify_ids(run: Run, channel: str, replica: str, job_ids: Iterable[UUID]) -> None:
    for some in _bundles(sorted(job_ids)):
        await notify(run, channel, " ".join([replica, *map(str, some)]))


def _bundles(job_ids: list[UUID]) -> Iterator[list[UUID]]:
    for start in range(0, len(job_ids), _NUM_IDS):
        yield job_ids[start : start + _NUM_IDS]
