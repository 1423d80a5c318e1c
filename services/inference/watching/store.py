"""What replicas tell each other of watched jobs, and how watched jobs stand in the queue, in PostgreSQL.

The table job_progress is UNLOGGED: it is a way, not a memory; after a crash of the database it is empty.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from services.common.database import Database, notify
from services.inference.queue.claim import QUEUED
from services.inference.rows import Job, JobProgress, Worker, now
from services.inference.signals import JOBS_MOVED, JOBS_WATCHED

_NUM_IDS = 200  # in a notification, which ends at 8,000 bytes
_NUM_RECENT = 16  # finished jobs from which an endpoint's pace is taken


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
class Standing:
    """How a job stands. `position` counts from 1 while it is queued; the estimate is None where nothing is known."""

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


class BoardStore:
    """One method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def jobs_of(self, leases: list[UUID]) -> dict[UUID, UUID]:
        """From each lease that is held to its job."""
        query = select(col(Job.lease_id), col(Job.id)).where(col(Job.lease_id).in_(leases))
        async with self._database.transaction() as session:
            return {lease_id: job_id for lease_id, job_id in await session.execute(query) if lease_id is not None}

    async def announce(self, replica: str, job_ids: Collection[UUID]) -> None:
        """Tells all replicas that these jobs are watched on this one."""
        async with self._database.transaction() as session:
            await _notify_ids(session, JOBS_WATCHED, replica, job_ids)

    async def publish(self, replica: str, progresses: dict[UUID, Progress]) -> None:
        """Writes how far jobs are, and tells all replicas of it."""
        rows = [
            {
                "job_id": job_id,
                "lease_id": progress.lease_id,
                "step": progress.step,
                "num_steps": progress.num_steps,
                "preview": progress.preview,
                "num_previews": progress.num_previews,
                "update_time": func.clock_timestamp(),
            }
            for job_id, progress in sorted(progresses.items())
        ]
        if not rows:
            return
        added = insert(JobProgress).values(rows)
        new = {name: added.excluded[name] for name in rows[0] if name != "job_id"}
        async with self._database.transaction() as session:
            await session.execute(added.on_conflict_do_update(index_elements=["job_id"], set_=new))
            await _notify_ids(session, JOBS_MOVED, replica, progresses)

    async def fetch(self, job_ids: Collection[UUID]) -> dict[UUID, Progress]:
        """How far jobs are that other replicas have written of."""
        query = select(JobProgress).where(col(JobProgress.job_id).in_(job_ids))
        async with self._database.transaction() as session:
            return {
                row.job_id: Progress(row.lease_id, True, row.step, row.num_steps, row.preview, row.num_previews)
                for row in await session.scalars(query)
            }

    async def sweep(self, age_seconds: float) -> None:
        """Removes what was written so long ago."""
        old = func.clock_timestamp() - func.make_interval(0, 0, 0, 0, 0, 0, age_seconds)
        async with self._database.transaction() as session:
            await session.execute(delete(JobProgress).where(col(JobProgress.update_time) < old))

    async def standings(self, job_ids: Collection[UUID]) -> dict[UUID, Standing]:
        """How those of the jobs stand that exist."""
        endpoints = select(col(Job.endpoint_id)).where(col(Job.id).in_(job_ids), QUEUED)
        places = {
            "partition_by": col(Job.endpoint_id),
            "order_by": [col(Job.priority_class), col(Job.priority).desc(), col(Job.virtual_start), col(Job.id)],
        }
        queue = (
            select(
                col(Job.id),
                func.row_number().over(**places).label("position"),  # type: ignore[arg-type]
                func.sum(col(Job.cost_seconds)).over(**places, rows=(None, -1)).label("cost_ahead"),  # type: ignore[arg-type]
            )
            .where(QUEUED, col(Job.endpoint_id).in_(endpoints))
            .subquery()
        )
        query = select(
            col(Job.id),
            col(Job.endpoint_id),
            col(Job.status),
            col(Job.lease_id),
            col(Job.is_running),
            queue.c.position,
            queue.c.cost_ahead,
        ).outerjoin(queue, queue.c.id == col(Job.id))
        async with self._database.transaction() as session:
            rows = (await session.execute(query.where(col(Job.id).in_(job_ids)))).all()
            queued_at = {row.endpoint_id for row in rows if row.position is not None}
            paces = {endpoint_id: await _pace(session, endpoint_id) for endpoint_id in queued_at}
        found = {}
        for row in rows:
            pace = paces.get(row.endpoint_id) if row.position is not None else None
            estimate = pace.start(row.cost_ahead or 0.0) if pace is not None else None
            found[row.id] = Standing(
                row.endpoint_id, row.status, row.lease_id, row.is_running, row.position or 0, estimate
            )
        return found


async def _pace(session: AsyncSession, endpoint_id: UUID) -> _Pace | None:
    """How fast an endpoint is now; None where no worker is, or none has finished a job."""
    here = col(Job.endpoint_id) == endpoint_id
    recent = (
        select(func.extract("epoch", col(Job.complete_time) - col(Job.start_time)), col(Job.cost_seconds))
        .where(here, col(Job.status) == "succeed")
        .order_by(col(Job.complete_time).desc())
        .limit(_NUM_RECENT)
    )
    finished = [(float(taken), cost) for taken, cost in await session.execute(recent) if taken is not None]
    cost = sum(cost for _, cost in finished)
    workers = select(func.count()).select_from(Worker).where(col(Worker.endpoint_id) == endpoint_id)
    num_workers = await session.scalar(workers) or 0
    if not num_workers or cost <= 0:
        return None
    held = select(func.count(), func.coalesce(func.sum(col(Job.cost_seconds)), 0.0)).where(
        here, col(Job.lease_id).is_not(None)
    )
    num_held, held_cost = (await session.execute(held)).one()
    # With a queue behind them the workers do as many jobs at once as they ever do.
    at_once = max(num_held, num_workers)
    return _Pace(sum(seconds for seconds, _ in finished) / cost / at_once, held_cost)


async def _notify_ids(session: AsyncSession, channel: str, replica: str, job_ids: Iterable[UUID]) -> None:
    for some in _bundles(sorted(job_ids)):
        await notify(session, channel, " ".join([replica, *map(str, some)]))


def _bundles(job_ids: list[UUID]) -> Iterator[list[UUID]]:
    for start in range(0, len(job_ids), _NUM_IDS):
        yield job_ids[start : start + _NUM_IDS]
