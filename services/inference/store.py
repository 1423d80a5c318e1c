"""Jobs in PostgreSQL as their users see them. One method is one transaction.

What workers do with jobs is in lease_store.py, what becomes of the jobs of an endpoint that goes away in pool_store.py.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import bindparam, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from services.common.database import Database, notify
from services.inference.enqueue import enqueue, locked
from services.inference.leftover_store import leave_behind
from services.inference.rows import Job
from services.inference.signals import JOB_ENDED, LEASES_LOST

_SECOND_TIME_SECONDS = 60.0  # whoever deletes a job removes its objects too, unless it dies in between

# What clients poll.
_BY_ID = select(Job.__table__).where(col(Job.id) == bindparam("id"))  # type: ignore[attr-defined]


class JobStore:
    """The jobs."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, job: Job) -> None:
        """Adds a job; one that is `inprogress` already takes its place in the queue."""
        async with self._database.transaction() as session:
            if job.status == "inprogress":
                await enqueue(session, job)
            session.add(job)

    async def get(self, job_id: UUID) -> Job | None:
        """The job, if there is one."""
        rows = await self._database.fetch(_BY_ID, id=job_id)
        return Job(**rows[0]) if rows else None

    async def page(
        self, task_type: str, owners: list[str] | None, limit: int, after: tuple[datetime, UUID] | None
    ) -> list[Job]:
        """Jobs of a type, newest first, of these owners or of all, after the position of another."""
        query = select(Job).where(col(Job.task_type) == task_type)
        if owners is not None:
            query = query.where(col(Job.owner).in_(owners))
        if after is not None:
            query = query.where(tuple_(col(Job.create_time), col(Job.id)) < after)
        query = query.order_by(col(Job.create_time).desc(), col(Job.id).desc()).limit(limit)
        async with self._database.transaction() as session:
            return list((await session.scalars(query)).all())

    async def queue(self, job_id: UUID, **frozen: Any) -> Job | None:
        """Puts a job into the queue (`Job.queue` has the arguments). None: it was deleted.

        Raises:
            FailedPrecondition: it is under way.
        """
        async with self._database.transaction() as session:
            job = await session.get(Job, job_id, with_for_update=True)
            if job is not None:
                if job.result_lease is not None:
                    await leave_behind(session, [job.result_prefix])
                job.queue(**frozen)
                await enqueue(session, job)
            return job

    async def cancel(self, job_id: UUID, reason: str) -> Job | None:
        """Fails a job that has not ended; one that was cancelled before stays as it is. None: it was deleted.

        Raises:
            FailedPrecondition: it has ended by itself.
        """
        async with self._database.transaction() as session:
            job = await session.get(Job, job_id, with_for_update=True)
            if job is not None and not job.is_cancelled:
                await _take_back(session, job)
                job.cancel(reason)
                await notify(session, JOB_ENDED, str(job.id))
            return job

    async def delete(self, job_ids: list[UUID]) -> list[Job]:
        """Deletes jobs, whatever their state, and leaves their objects to the cleaner; answers those it found."""
        async with self._database.transaction() as session:
            jobs = list(await session.scalars(locked(select(Job).where(col(Job.id).in_(job_ids)))))
            for job in jobs:
                await _take_back(session, job)
                await leave_behind(session, job.prefixes, _SECOND_TIME_SECONDS)
                await session.delete(job)
                await notify(session, JOB_ENDED, str(job.id))
            return jobs


async def _take_back(session: AsyncSession, job: Job) -> None:
    """Tells the worker that holds the job, if one does, that it is not its own any more."""
    if job.lease_id is not None and job.worker_id is not None:
        await leave_behind(session, [job.lease_prefix(job.lease_id)])
        await notify(session, LEASES_LOST, job.worker_id)
