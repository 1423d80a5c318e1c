"""The pools of the endpoints in PostgreSQL: who works, what waits, and which endpoints went away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Select, case, delete, func, select, true
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import aliased
from sqlmodel import col

from services.common.database import Database, notify
from services.inference.queue.claim import QUEUED, UNDER_WAY
from services.inference.queue.enqueue import enqueue, locked
from services.inference.rows import Job, PinnedModels, RetiredEndpoint, Worker
from services.inference.signals import JOB_ENDED, MODELS_PINNED

_NUM_RECENT = 16  # finished jobs from which an endpoint's pace is taken


@dataclass(frozen=True)
class PoolState:
    """The workers with a stream, the jobs, and how long one worker would take for all of them, where that is known."""

    worker_ids: list[str]
    num_queued: int = 0
    num_held: int = 0
    work_seconds: float | None = None


def _work() -> Select[Any]:
    """Of each endpoint with jobs under way: how many, their cost, and what the last successes cost and took."""
    held = func.count(col(Job.lease_id))
    # Those that are held are half done, on average.
    cost = func.sum(case((col(Job.lease_id).is_(None), col(Job.cost_seconds)), else_=col(Job.cost_seconds) / 2))
    jobs = (
        select(
            col(Job.endpoint_id), (func.count() - held).label("num_queued"), held.label("num_held"), cost.label("cost")
        )
        .where(UNDER_WAY)
        .group_by(col(Job.endpoint_id))
        .subquery()
    )
    done = aliased(Job)
    recent = (
        select(
            func.extract("epoch", col(done.complete_time) - col(done.start_time)).label("seconds"),
            col(done.cost_seconds),
        )
        .where(col(done.endpoint_id) == jobs.c.endpoint_id, col(done.status) == "succeed")
        .order_by(col(done.complete_time).desc())
        .limit(_NUM_RECENT)
        .correlate(jobs)
        .subquery()
    )
    finished = select(
        func.sum(recent.c.seconds).label("finished_seconds"), func.sum(recent.c.cost_seconds).label("finished_cost")
    ).where(recent.c.seconds.is_not(None))
    pace = finished.lateral()
    return select(jobs, pace.c.finished_seconds, pace.c.finished_cost).join(pace, true())


_WORK = _work()


class PoolStore:
    """The pools."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def pools(self) -> dict[UUID, PoolState]:
        """The pool of each endpoint that has workers or jobs under way."""
        workers = select(col(Worker.endpoint_id), func.array_agg(Worker.worker_id)).group_by(col(Worker.endpoint_id))
        async with self._database.transaction() as session:
            found = {endpoint: PoolState(sorted(ids)) for endpoint, ids in await session.execute(workers)}
            for row in await session.execute(_WORK):
                worker_ids = found[row.endpoint_id].worker_ids if row.endpoint_id in found else []
                work_seconds = None
                if worker_ids and row.finished_cost:
                    # Jobs that a worker runs at once take turns, and with a queue behind them they are as many as ever.
                    at_once = max(1.0, row.num_held / len(worker_ids))
                    work_seconds = row.cost * float(row.finished_seconds) / row.finished_cost / at_once
                found[row.endpoint_id] = PoolState(worker_ids, row.num_queued, row.num_held, work_seconds)
        return found

    async def pin(self, endpoint_id: UUID, names: list[str]) -> None:
        """Remembers which checkpoints the endpoint's workers keep ready, and tells those who speak with its workers."""
        row = insert(PinnedModels).values(endpoint_id=endpoint_id, names=names)
        async with self._database.transaction() as session:
            if names:
                await session.execute(row.on_conflict_do_update(index_elements=["endpoint_id"], set_={"names": names}))
            else:
                await session.execute(delete(PinnedModels).where(col(PinnedModels.endpoint_id) == endpoint_id))
            await notify(session, MODELS_PINNED, str(endpoint_id))

    async def pinned(self, endpoint_id: UUID) -> list[str]:
        """The checkpoints that the endpoint's workers keep ready."""
        async with self._database.transaction() as session:
            found = await session.get(PinnedModels, endpoint_id)
        return found.names if found else []

    async def retire(self, endpoint_id: UUID, reason: str) -> None:
        """Remembers that an endpoint went away."""
        row = insert(RetiredEndpoint).values(endpoint_id=endpoint_id, reason=reason)
        async with self._database.transaction() as session:
            await session.execute(row.on_conflict_do_update(index_elements=["endpoint_id"], set_={"reason": reason}))

    async def revive(self, endpoint_id: UUID) -> None:
        """Forgets that an endpoint went away, because it is usable again."""
        async with self._database.transaction() as session:
            await session.execute(delete(RetiredEndpoint).where(col(RetiredEndpoint.endpoint_id) == endpoint_id))

    async def stranded(self, endpoint_id: UUID | None = None) -> list[tuple[Job, str]]:
        """Queued jobs of endpoints that went away (of this one), with the reason."""
        query = select(Job, col(RetiredEndpoint.reason)).join(
            RetiredEndpoint, col(RetiredEndpoint.endpoint_id) == col(Job.endpoint_id)
        )
        query = query.where(QUEUED)
        if endpoint_id is not None:
            query = query.where(col(Job.endpoint_id) == endpoint_id)
        async with self._database.transaction() as session:
            return [(job, reason) for job, reason in await session.execute(query.limit(1000))]

    async def move(self, job_id: UUID, to: tuple[UUID, str, str]) -> bool:
        """Moves a queued job to another endpoint: id, name, instance type. False: it is not queued any more."""
        async with self._database.transaction() as session:
            job = await session.scalar(locked(select(Job).where(col(Job.id) == job_id, QUEUED)))
            if job is not None:
                job.move(*to)
                await enqueue(session, job)
            return job is not None

    async def fail_queued(self, job_id: UUID, reason: str) -> bool:
        """Fails a queued job. False: it is not queued any more."""
        async with self._database.transaction() as session:
            job = await session.scalar(locked(select(Job).where(col(Job.id) == job_id, QUEUED)))
            if job is not None:
                job.fail(reason)
                await notify(session, JOB_ENDED, str(job.id))
            return job is not None
