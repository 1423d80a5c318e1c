"""Jobs in PostgreSQL as their users see them. One method is one transaction.

What workers do with jobs is in queue/store.py, what becomes of the jobs of an endpoint that goes away in
queue/pool_store.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import ARRAY, Interval, Uuid, any_, bindparam, delete, func, select, tuple_, update
from sqlmodel import col

from services.common.database import Database, notify
from services.common.driver import Run
from services.common.leftovers import note_leftovers, withdraw_leftovers
from services.inference.channels import DEADLINE_SET, JOB_ENDED, LEASES_LOST
from services.inference.queue.enqueue import enqueue
from services.inference.rows import Job, Submission, Usage
from services.inference.submitting.quotas import NO_QUOTAS, Quotas, admit, note_usage
from services.inference.submitting.submissions import LIFETIME, find_submission, remember
from services.inference.table import (
    JOB,
    NOT_UNDER_WAY,
    UNDER_WAY,
    add_job,
    locked,
    read_job,
    read_jobs,
    save_job,
)

_SECOND_TIME_SECONDS = 60.0  # whoever deletes a job removes its objects too, unless it dies in between
_AT_ONCE = 100

_BY_ID = select(JOB).where(JOB.c.id == bindparam("id"))
_BY_ID_LOCKED = locked(_BY_ID)
_THESE = JOB.c.id == any_(bindparam("ids", type_=ARRAY(Uuid)))
_THESE_LOCKED = locked(select(JOB).where(_THESE))
_DELETE = delete(JOB).where(_THESE)
_AGO: Any = func.now() - bindparam("age", type_=Interval)
_WITHOUT_OUTPUT = select(JOB).where(JOB.c.is_output_missing, JOB.c.complete_time <= _AGO).limit(_AT_ONCE)
_NOTE_OUTPUT = (
    update(JOB)
    .where(JOB.c.id == bindparam("this"), JOB.c.result_lease == bindparam("lease"))
    .values(is_output_missing=False)
)
_OLD = (
    select(JOB)
    .where(NOT_UNDER_WAY, func.coalesce(JOB.c.complete_time, JOB.c.create_time) < _AGO)
    .limit(_AT_ONCE)
    .with_for_update(of=JOB, skip_locked=True)
)
_FORGET_SUBMISSIONS = delete(Submission).where(col(Submission.create_time) < func.now() - LIFETIME)
_FORGET_USAGE = delete(Usage).where(col(Usage.minute) < func.now() - timedelta(hours=2))
_LATE = (
    select(JOB)
    .where(UNDER_WAY, JOB.c.deadline_time <= func.clock_timestamp())
    .with_for_update(of=JOB, skip_locked=True)
)
_TO_NEXT_DEADLINE = select(
    func.extract("epoch", func.min(JOB.c.deadline_time) - func.clock_timestamp()).label("seconds")
).where(UNDER_WAY, JOB.c.deadline_time.is_not(None))


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

    async def add(self, job: Job, submission: Submission | None = None, expected: list[str] | None = None) -> None:
        """Adds a job; one that is `inprogress` already takes its place in the queue. Objects of it that are there
        before it were `expected` below these prefixes.

        Raises:
            ResourceExhausted: its owner's quota is used up.
            SubmittedBefore: another job was created under the same key, a moment ago.
        """
        async with self._database.atomic() as run:
            if job.status == "inprogress":
                await self._enter(run, job)
            await add_job(run, job)
            if expected:
                await withdraw_leftovers(run, expected)
            if submission is not None:
                await remember(run, submission)

    async def find_submission(self, owner: str, key: str) -> tuple[str, Job] | None:
        """What the owner created under the key within the last day: the SHA-256 of the request, and the job."""
        return await find_submission(self._database.run, owner, key)

    async def get(self, job_id: UUID) -> Job | None:
        """The job, if there is one."""
        return await read_job(self._database.run, _BY_ID, id=job_id)

    async def page(self, wanted: JobFilter, limit: int, after: tuple[datetime, UUID] | None) -> list[Job]:
        """The jobs that are wanted, newest first, after the position of another."""
        query = select(JOB).where(JOB.c.task_type == wanted.task_type)
        if wanted.owners is not None:
            query = query.where(JOB.c.owner.in_(wanted.owners))
        if wanted.status:
            query = query.where(JOB.c.status == wanted.status)
        if wanted.endpoint_name:
            query = query.where(JOB.c.endpoint_name == wanted.endpoint_name)
        if wanted.since is not None:
            query = query.where(JOB.c.create_time >= wanted.since)
        if wanted.until is not None:
            query = query.where(JOB.c.create_time <= wanted.until)
        if after is not None:
            query = query.where(tuple_(JOB.c.create_time, JOB.c.id) < after)
        query = query.order_by(JOB.c.create_time.desc(), JOB.c.id.desc()).limit(limit)
        return await read_jobs(self._database.run, query)

    async def queue(self, job_id: UUID, **frozen: Any) -> Job | None:
        """Puts a job into the queue (`Job.queue` has the arguments). None: it was deleted.

        Raises:
            FailedPrecondition: it is under way. ResourceExhausted: its owner's quota is used up.
        """
        async with self._database.atomic() as run:
            job = await read_job(run, _BY_ID_LOCKED, id=job_id)
            if job is not None:
                if job.result_lease is not None:
                    old_output = [job.output_key] if job.output_key else []
                    await note_leftovers(run, [job.result_prefix, *old_output])
                job.queue(**frozen)
                await self._enter(run, job)
                await save_job(run, job)
            return job

    async def cancel(self, job_id: UUID, reason: str) -> Job | None:
        """Fails a job that has not ended; one that was cancelled before stays as it is. None: it was deleted.

        Raises:
            FailedPrecondition: it has ended by itself.
        """
        async with self._database.atomic() as run:
            job = await read_job(run, _BY_ID_LOCKED, id=job_id)
            if job is not None and not job.is_cancelled:
                await _take_back(run, job)
                job.cancel(reason)
                await save_job(run, job)
                await notify(run, JOB_ENDED, str(job.id))
            return job

    async def delete(self, job_ids: list[UUID]) -> list[Job]:
        """Deletes jobs, whatever their state, and leaves their objects to the cleaner; answers those it found."""
        async with self._database.atomic() as run:
            jobs = await read_jobs(run, _THESE_LOCKED, ids=job_ids)
            for job in jobs:
                await _take_back(run, job)
                await note_leftovers(run, job.prefixes, _SECOND_TIME_SECONDS)
                await notify(run, JOB_ENDED, str(job.id))
            await run(_DELETE, ids=job_ids)
            return jobs

    async def without_output(self, age_seconds: float) -> list[Job]:
        """Jobs that succeeded so long ago and whose raw answer is not written; at most 100."""
        return await read_jobs(self._database.run, _WITHOUT_OUTPUT, age=timedelta(seconds=age_seconds))

    async def note_output(self, job_id: UUID, result_lease: UUID) -> None:
        """The raw answer of this result is written."""
        await self._database.run(_NOTE_OUTPUT, this=job_id, lease=result_lease)

    async def delete_old(self, days: float) -> int:
        """Deletes jobs that ended, or were created and never started, so many days ago; 100 at most, tells how many."""
        async with self._database.atomic() as run:
            jobs = await read_jobs(run, _OLD, age=timedelta(days=days))
            for job in jobs:
                await note_leftovers(run, job.prefixes)
            await run(_DELETE, ids=[job.id for job in jobs])
            return len(jobs)

    async def forget(self) -> None:
        """Removes what is kept of submissions and usage for a time only."""
        await self._database.run(_FORGET_SUBMISSIONS)
        await self._database.run(_FORGET_USAGE)

    async def expire(self) -> float | None:
        """Fails jobs whose deadline has passed; answers in how many seconds the next one's passes, if there is one."""
        async with self._database.atomic() as run:
            for job in await read_jobs(run, _LATE):
                await _take_back(run, job)
                reason = f"the deadline passed: the job had not ended {job.deadline_seconds:g} s after its start"
                job.fail(reason + (", as the object store could not be reached" if job.postponed_since else ""))
                await save_job(run, job)
                await notify(run, JOB_ENDED, str(job.id))
            (next_one,) = await run(_TO_NEXT_DEADLINE)
            return None if next_one["seconds"] is None else float(next_one["seconds"])

    async def _enter(self, run: Run, job: Job) -> None:
        """Takes a place in the queue; the deadline counts from now, by the clock that judges it.

        Raises:
            ResourceExhausted: its owner's quota is used up.
        """
        time = await enqueue(run, job)
        if job.deadline_seconds is not None:
            job.deadline_time = time + timedelta(seconds=job.deadline_seconds)
            await notify(run, DEADLINE_SET, str(job.id))
        await admit(run, job, self._quotas)


async def _take_back(run: Run, job: Job) -> None:
    """Tells the worker that holds the job, if one does, that it is not its own any more."""
    if job.lease_id is not None and job.worker_id is not None:
        await note_leftovers(run, [job.lease_prefix(job.lease_id)])
        await note_usage(run, job, job.running_seconds)
        await notify(run, LEASES_LOST, job.worker_id)
