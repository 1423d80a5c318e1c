"""Workers and their leases in PostgreSQL. One method is one transaction.

Who gets which job is decided in claim.py. Whatever a worker tells counts only under a lease that is its own now.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from uuid import UUID

from sqlalchemy import bindparam, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from services.common.database import Database, notify
from services.common.leftovers import leave_behind
from services.inference.queue.claim import CLAIM, QUEUED, UNDER_WAY, of_stream
from services.inference.queue.enqueue import locked
from services.inference.rows import Job, Worker
from services.inference.signals import JOB_ENDED, JOBS_QUEUED, LEASES_LOST, POOLS_CHANGED
from services.inference.submitting.quotas import note_usage

_ANY_QUEUED = select(col(Job.id)).where(col(Job.endpoint_id) == bindparam("endpoint"), QUEUED).limit(1)


class LeaseStore:
    """The workers and what they hold."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def claim(
        self, endpoint_id: UUID, worker_id: str, stream_id: UUID, num_jobs: int, warm_models: Iterable[str]
    ) -> list[Job]:
        """Leases up to so many jobs of the endpoint to a worker, in one statement. Nothing for a superseded stream."""
        names = {"endpoint": endpoint_id, "worker": worker_id, "stream": stream_id}
        async with self._database.transaction() as session:
            claimed = await session.scalars(CLAIM, {**names, "num_jobs": num_jobs, "warm_models": list(warm_models)})
            jobs = list(claimed.all())
        return sorted(jobs, key=lambda job: (job.priority_class, -job.priority, job.virtual_start))

    async def has_queued(self, endpoint_id: UUID) -> bool:
        """Whether a job waits. After a claim that found none: another transaction has it locked at present."""
        return bool(await self._database.fetch(_ANY_QUEUED, endpoint=endpoint_id))

    async def start(self, endpoint_id: UUID, lease_id: UUID) -> bool:
        """Notes that the holder of a lease has begun; False when the lease is lost."""
        async with self._database.transaction() as session:
            job = await _held(session, endpoint_id, lease_id)
            if job is not None:
                job.start()
            return job is not None

    async def find_by_lease(self, lease_id: UUID) -> Job | None:
        """The job that is held, or was completed, under the lease."""
        under = (col(Job.lease_id) == lease_id) | (col(Job.result_lease) == lease_id)
        async with self._database.transaction() as session:
            return await session.scalar(select(Job).where(under))

    async def succeed(
        self, endpoint_id: UUID, lease_id: UUID, objects: list[dict[str, Any]], timings: dict[str, float]
    ) -> Job | None:
        """Completes the job that is held under the lease; None when the lease is lost."""
        async with self._database.transaction() as session:
            job = await _held(session, endpoint_id, lease_id)
            if job is not None:
                await note_usage(session, job, timings.get("pipeline_seconds", job.running_seconds))
                job.succeed(objects, timings)
                await notify(session, JOB_ENDED, str(job.id))
            return job

    async def fail(self, endpoint_id: UUID, lease_id: UUID, reason: str) -> Job | None:
        """Fails the job that is held under the lease; None when the lease is lost."""
        async with self._database.transaction() as session:
            job = await _held(session, endpoint_id, lease_id)
            if job is not None:
                await leave_behind(session, [job.lease_prefix(lease_id)])
                await note_usage(session, job, job.running_seconds)
                job.fail(reason)
                await notify(session, JOB_ENDED, str(job.id))
            return job

    async def give_back(self, endpoint_id: UUID, lease_id: UUID) -> bool:
        """Puts the job that is held under the lease back into the queue; False when the lease is lost."""
        async with self._database.transaction() as session:
            job = await _held(session, endpoint_id, lease_id)
            if job is not None:
                await _release(session, [job])
            return job is not None

    async def welcome(self, worker: Worker, held_leases: list[UUID]) -> list[UUID]:
        """Binds a worker to its new stream; answers which leases it keeps and requeues what it does not know of."""
        async with self._database.transaction() as session:
            fields = worker.model_dump(exclude={"last_seen"}) | {"last_seen": func.clock_timestamp()}
            upsert = insert(Worker).values(fields)
            await session.execute(
                upsert.on_conflict_do_update(index_elements=["endpoint_id", "worker_id"], set_=fields)
            )
            of_worker = (col(Job.endpoint_id) == worker.endpoint_id) & (col(Job.worker_id) == worker.worker_id)
            jobs = list(await session.scalars(locked(select(Job).where(of_worker, col(Job.lease_id).is_not(None)))))
            await _release(session, [job for job in jobs if job.lease_id not in held_leases])
            await notify(session, POOLS_CHANGED, str(worker.endpoint_id))
            return [job.lease_id for job in jobs if job.lease_id is not None]

    async def renew(self, endpoint_id: UUID, worker_id: str, stream_id: UUID) -> bool:
        """Keeps all leases of a worker alive; False when another stream has taken over, or the worker was reaped."""
        seen = (
            update(Worker).values(last_seen=func.clock_timestamp()).where(of_stream(endpoint_id, worker_id, stream_id))
        )
        async with self._database.transaction() as session:
            return await session.scalar(seen.returning(col(Worker.worker_id))) is not None

    async def leases(self, endpoint_id: UUID, worker_id: str) -> set[UUID]:
        """The leases that a worker holds."""
        query = select(col(Job.lease_id)).where(
            col(Job.endpoint_id) == endpoint_id, col(Job.worker_id) == worker_id, col(Job.lease_id).is_not(None)
        )
        async with self._database.transaction() as session:
            return {lease for lease in await session.scalars(query) if lease is not None}

    async def leave(self, endpoint_id: UUID, worker_id: str, stream_id: UUID) -> int:
        """Takes back what a worker held, unless it has come back by another stream; answers how many jobs."""
        gone = delete(Worker).where(of_stream(endpoint_id, worker_id, stream_id)).returning(col(Worker.worker_id))
        async with self._database.transaction() as session:
            if await session.scalar(gone) is None:
                return 0
            return await _reap(session)

    async def reap(self, lease_seconds: float) -> int:
        """Takes back what workers held that were not seen for a lease's life; answers how many jobs."""
        old = func.clock_timestamp() - func.make_interval(0, 0, 0, 0, 0, 0, lease_seconds)
        async with self._database.transaction() as session:
            await session.execute(delete(Worker).where(col(Worker.last_seen) < old))
            return await _reap(session)


async def _held(session: AsyncSession, endpoint_id: UUID, lease_id: UUID) -> Job | None:
    """The fence: the job that is held under this lease now, locked."""
    held = select(Job).where(col(Job.lease_id) == lease_id, col(Job.endpoint_id) == endpoint_id, UNDER_WAY)
    return await session.scalar(locked(held))


async def _reap(session: AsyncSession) -> int:
    """Takes back the jobs whose worker is not there any more."""
    with_worker = select(col(Worker.worker_id)).where(
        col(Worker.endpoint_id) == col(Job.endpoint_id), col(Worker.worker_id) == col(Job.worker_id)
    )
    orphans = select(Job).where(col(Job.lease_id).is_not(None), ~with_worker.exists())
    jobs = list(await session.scalars(locked(orphans)))
    await _release(session, jobs)
    await notify(session, POOLS_CHANGED, "all")
    return len(jobs)


async def _release(session: AsyncSession, jobs: list[Job]) -> None:
    for job in jobs:
        if job.worker_id is not None and job.lease_id is not None:
            await notify(session, LEASES_LOST, job.worker_id)
            await leave_behind(session, [job.lease_prefix(job.lease_id)])
        job.lose()
        if job.is_ended:
            await notify(session, JOB_ENDED, str(job.id))
        else:
            await notify(session, JOBS_QUEUED, str(job.endpoint_id))
