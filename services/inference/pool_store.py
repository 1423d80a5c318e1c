"""The pools of the endpoints in PostgreSQL: who works, what waits, and which endpoints went away."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlmodel import col

from services.common.database import Database, notify
from services.inference.claim import QUEUED, UNDER_WAY
from services.inference.enqueue import enqueue, locked
from services.inference.rows import Job, RetiredEndpoint, Worker
from services.inference.signals import JOB_ENDED


class PoolStore:
    """The pools."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def pools(self) -> dict[UUID, tuple[list[str], int, int]]:
        """Of each endpoint with workers or jobs under way: the workers' ids, how many jobs wait, how many are held."""
        workers = select(col(Worker.endpoint_id), func.array_agg(Worker.worker_id)).group_by(col(Worker.endpoint_id))
        held = func.count(col(Job.lease_id))
        jobs = select(col(Job.endpoint_id), func.count() - held, held).where(UNDER_WAY)
        async with self._database.transaction() as session:
            found = {endpoint: (sorted(ids), 0, 0) for endpoint, ids in await session.execute(workers)}
            for endpoint, num_queued, num_held in await session.execute(jobs.group_by(col(Job.endpoint_id))):
                found[endpoint] = (found[endpoint][0] if endpoint in found else [], num_queued, num_held)
        return found

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
