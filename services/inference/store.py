"""Jobs in PostgreSQL as their users see them. One method is one transaction.

What workers do with jobs is in queue/store.py, what becomes of the jobs of an endpoint that goes away in
queue/pool_store.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import bindparam, delete, func, literal_column, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from services.common.database import Database, notify
from services.common.leftovers import leave_behind
from services.inference.queue.claim import NOT_UNDER_WAY, UNDER_WAY
from services.inference.queue.enqueue import enqueue, locked
from services.inference.rows import Job, Submission, Usage
from services.inference.signals import JOB_ENDED, LEASES_LOST
from services.inference.submitting.quotas import NO_QUOTAS, Quotas, admit, note_usage
from services.inference.submitting.submissions import LIFETIME, find_submission, remember

_SECOND_TIME_SECONDS = 60.0  # whoever deletes a job removes its objects too, unless it dies in between

# What clients poll.
_BY_ID = select(Job.__table__).where(col(Job.id) == bindparam("id"))  # type: ignore[attr-defined]


@dataclass(frozen=True)
class JobFilter:
    """Which jobs a list has: of a task type, of these owners or (None) all, created between two times, both included.

    What is empty filters nothing.
    """

    task_type: str
    owners: list[str] | None = None
    status: str = ""
    endpoint_name: str = ""
    since: datetime | None = None
    until: datetime | None = None


class JobStore:
    """The jobs."""

    def __init__(self, database: Database, quotas: Quotas = NO_QUOTAS) -> None:
        self._database = database
        self._quotas = quotas

    async def add(self, job: Job, submission: Submission | None = None) -> None:
        """Adds a job; one that is `inprogress` already takes its place in the queue.

        Raises:
            ResourceExhausted: its owner's quota is used up.
            SubmittedBefore: another job was created under the same key, a moment ago.
        """
        async with self._database.transaction() as session:
            if job.status == "inprogress":
                await admit(session, job.owner, self._quotas)
                await enqueue(session, job)
            session.add(job)
            if submission is not None:
                await session.flush()
                await remember(session, submission)

    async def find_submission(self, owner: str, key: str) -> tuple[Submission, Job] | None:
        """What the owner created under the key within the last day."""
        async with self._database.transaction() as session:
            return await find_submission(session, owner, key)

    async def get(self, job_id: UUID) -> Job | None:
        """The job, if there is one."""
        rows = await self._database.fetch(_BY_ID, id=job_id)
        return Job(**rows[0]) if rows else None

    async def page(self, wanted: JobFilter, limit: int, after: tuple[datetime, UUID] | None) -> list[Job]:
        """The jobs that are wanted, newest first, after the position of another."""
        query = select(Job).where(col(Job.task_type) == wanted.task_type)
        if wanted.owners is not None:
            query = query.where(col(Job.owner).in_(wanted.owners))
        if wanted.status:
            query = query.where(col(Job.status) == wanted.status)
        if wanted.endpoint_name:
            query = query.where(col(Job.endpoint_name) == wanted.endpoint_name)
        if wanted.since is not None:
            query = query.where(col(Job.create_time) >= wanted.since)
        if wanted.until is not None:
            query = query.where(col(Job.create_time) <= wanted.until)
        if after is not None:
            query = query.where(tuple_(col(Job.create_time), col(Job.id)) < after)
        query = query.order_by(col(Job.create_time).desc(), col(Job.id).desc()).limit(limit)
        async with self._database.transaction() as session:
            return list((await session.scalars(query)).all())

    async def queue(self, job_id: UUID, **frozen: Any) -> Job | None:
        """Puts a job into the queue (`Job.queue` has the arguments). None: it was deleted.

        Raises:
            FailedPrecondition: it is under way. ResourceExhausted: its owner's quota is used up.
        """
        async with self._database.transaction() as session:
            job = await session.get(Job, job_id, with_for_update=True)
            if job is not None:
                if job.result_lease is not None:
                    old_output = [job.output_key] if job.output_key else []
                    await leave_behind(session, [job.result_prefix, *old_output])
                job.queue(**frozen)
                with session.no_autoflush:
                    await admit(session, job.owner, self._quotas)
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

    async def without_output(self, age_seconds: float) -> list[Job]:
        """Jobs that succeeded so long ago and whose raw answer is not written; at most 100."""
        before = func.now() - timedelta(seconds=age_seconds)
        query = select(Job).where(literal_column("job.is_output_missing"), col(Job.complete_time) <= before).limit(100)
        async with self._database.transaction() as session:
            return list(await session.scalars(query))

    async def note_output(self, job_id: UUID, result_lease: UUID) -> None:
        """The raw answer of this result is written."""
        this = (col(Job.id) == job_id) & (col(Job.result_lease) == result_lease)
        async with self._database.transaction() as session:
            await session.execute(update(Job).where(this).values(is_output_missing=False))

    async def delete_old(self, days: float) -> int:
        """Deletes jobs that ended, or were created and never started, so many days ago; 100 at most, tells how many."""
        age = func.coalesce(col(Job.complete_time), col(Job.create_time))
        old = select(Job).where(NOT_UNDER_WAY, age < func.now() - timedelta(days=days)).limit(100)
        async with self._database.transaction() as session:
            jobs = list(await session.scalars(old.with_for_update(of=Job, skip_locked=True)))
            for job in jobs:
                await leave_behind(session, job.prefixes)
                await session.delete(job)
            return len(jobs)

    async def forget(self) -> None:
        """Removes what is kept of submissions and usage for a time only."""
        async with self._database.transaction() as session:
            await session.execute(delete(Submission).where(col(Submission.create_time) < func.now() - LIFETIME))
            await session.execute(delete(Usage).where(col(Usage.minute) < func.now() - timedelta(hours=2)))

    async def expire(self) -> float | None:
        """Fails jobs whose deadline has passed; answers in how many seconds the next one's passes, if there is one."""
        late = select(Job).where(UNDER_WAY, col(Job.deadline_time) <= func.clock_timestamp())
        left = func.extract("epoch", func.min(col(Job.deadline_time)) - func.clock_timestamp())
        async with self._database.transaction() as session:
            for job in await session.scalars(late.with_for_update(of=Job, skip_locked=True)):
                await _take_back(session, job)
                job.fail(f"the deadline passed: the job had not ended {job.deadline_seconds:g} s after its start")
                await notify(session, JOB_ENDED, str(job.id))
            seconds = await session.scalar(select(left).where(UNDER_WAY, col(Job.deadline_time).is_not(None)))
            return None if seconds is None else float(seconds)


async def _take_back(session: AsyncSession, job: Job) -> None:
    """Tells the worker that holds the job, if one does, that it is not its own any more."""
    if job.lease_id is not None and job.worker_id is not None:
        await leave_behind(session, [job.lease_prefix(job.lease_id)])
        await note_usage(session, job, job.running_seconds)
        await notify(session, LEASES_LOST, job.worker_id)
