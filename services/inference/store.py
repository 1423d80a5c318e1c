"""Jobs, workers and the fair queue in PostgreSQL. One method is one transaction.

Who gets which job is decided in claim.py; here a job gets its place in the queue.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Select, bindparam, delete, func, select, tuple_, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from services.common.database import Database, notify
from services.inference.claim import CLAIM, QUEUE_CLOCK, QUEUED, UNDER_WAY, of_stream
from services.inference.rows import Job, RetiredEndpoint, UserClock, Worker
from services.inference.signals import JOB_ENDED, JOBS_QUEUED, LEASES_LOST, POOLS_CHANGED

# What clients poll.
_BY_ID = select(Job.__table__).where(col(Job.id) == bindparam("id"))  # type: ignore[attr-defined]


class JobStore:
    """The tables of the inference service."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # --- what users do ---

    async def add(self, job: Job) -> None:
        """Adds a job; one that is `inprogress` already takes its place in the queue."""
        async with self._database.transaction() as session:
            if job.status == "inprogress":
                await _enqueue(session, job)
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
                job.queue(**frozen)
                await _enqueue(session, job)
            return job

    async def cancel(self, job_ids: list[UUID], reason: str) -> list[Job]:
        """Fails those of the jobs that are under way, and answers all that exist."""
        async with self._database.transaction() as session:
            jobs = list(await session.scalars(_locked(select(Job).where(col(Job.id).in_(job_ids)))))
            for job in jobs:
                if job.worker_id is not None:
                    await notify(session, LEASES_LOST, job.worker_id)
                if job.status == "inprogress":
                    job.fail(reason)
                    await notify(session, JOB_ENDED, str(job.id))
            return jobs

    async def remove(self, job_ids: list[UUID]) -> None:
        """Removes jobs."""
        async with self._database.transaction() as session:
            await session.execute(delete(Job).where(col(Job.id).in_(job_ids)))

    # --- what workers do ---

    async def claim(
        self, endpoint_id: UUID, worker_id: str, stream_id: UUID, num_jobs: int, warm_models: Iterable[str]
    ) -> list[Job]:
        """Leases up to so many jobs of the endpoint to a worker, in one statement. Nothing for a superseded stream."""
        names = {"endpoint": endpoint_id, "worker": worker_id, "stream": stream_id}
        async with self._database.transaction() as session:
            claimed = await session.scalars(CLAIM, {**names, "num_jobs": num_jobs, "warm_models": list(warm_models)})
            jobs = list(claimed.all())
        return sorted(jobs, key=lambda job: (job.priority_class, job.virtual_start))

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
        self, endpoint_id: UUID, lease_id: UUID, image_names: list[str], timings: dict[str, float]
    ) -> Job | None:
        """Completes the job that is held under the lease; None when the lease is lost."""
        async with self._database.transaction() as session:
            job = await _held(session, endpoint_id, lease_id)
            if job is not None:
                job.succeed(image_names, timings)
                await notify(session, JOB_ENDED, str(job.id))
            return job

    async def fail(self, endpoint_id: UUID, lease_id: UUID, reason: str) -> Job | None:
        """Fails the job that is held under the lease; None when the lease is lost."""
        async with self._database.transaction() as session:
            job = await _held(session, endpoint_id, lease_id)
            if job is not None:
                job.fail(reason)
                await notify(session, JOB_ENDED, str(job.id))
            return job

    async def welcome(self, worker: Worker, held_leases: list[UUID]) -> list[UUID]:
        """Binds a worker to its new stream; answers which leases it keeps and requeues what it does not know of."""
        async with self._database.transaction() as session:
            fields = worker.model_dump(exclude={"last_seen"}) | {"last_seen": func.clock_timestamp()}
            upsert = insert(Worker).values(fields)
            await session.execute(
                upsert.on_conflict_do_update(index_elements=["endpoint_id", "worker_id"], set_=fields)
            )
            of_worker = (col(Job.endpoint_id) == worker.endpoint_id) & (col(Job.worker_id) == worker.worker_id)
            jobs = list(await session.scalars(_locked(select(Job).where(of_worker, col(Job.lease_id).is_not(None)))))
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

    # --- what nobody asked for ---

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
            job = await session.scalar(_locked(select(Job).where(col(Job.id) == job_id, QUEUED)))
            if job is not None:
                job.endpoint_id, job.endpoint_name, job.instance_type = to
                await _enqueue(session, job)
            return job is not None

    async def fail_queued(self, job_id: UUID, reason: str) -> bool:
        """Fails a queued job. False: it is not queued any more."""
        async with self._database.transaction() as session:
            job = await session.scalar(_locked(select(Job).where(col(Job.id) == job_id, QUEUED)))
            if job is not None:
                job.fail(reason)
                await notify(session, JOB_ENDED, str(job.id))
            return job is not None


async def _enqueue(session: AsyncSession, job: Job) -> None:
    """Gives the job its virtual start at the end of its owner's work, and wakes the endpoint's workers."""
    clock = col(UserClock.virtual_time)
    queue_time = (
        select(func.coalesce(func.max(clock), 0.0))
        .where(col(UserClock.endpoint_id) == job.endpoint_id, col(UserClock.username) == QUEUE_CLOCK)
        .scalar_subquery()
    )
    first = insert(UserClock).values(
        endpoint_id=job.endpoint_id, username=job.owner, virtual_time=queue_time + job.cost_seconds
    )
    later = func.greatest(clock, queue_time) + job.cost_seconds
    upsert = first.on_conflict_do_update(index_elements=["endpoint_id", "username"], set_={"virtual_time": later})
    with session.no_autoflush:  # until it has a virtual start the row contradicts its constraints
        job.virtual_start = await session.scalar(upsert.returning(clock - job.cost_seconds))
    await notify(session, JOBS_QUEUED, str(job.endpoint_id))


async def _held(session: AsyncSession, endpoint_id: UUID, lease_id: UUID) -> Job | None:
    """The fence: the job that is held under this lease now, locked."""
    held = select(Job).where(col(Job.lease_id) == lease_id, col(Job.endpoint_id) == endpoint_id, UNDER_WAY)
    return await session.scalar(_locked(held))


async def _reap(session: AsyncSession) -> int:
    """Takes back the jobs whose worker is not there any more."""
    with_worker = select(col(Worker.worker_id)).where(
        col(Worker.endpoint_id) == col(Job.endpoint_id), col(Worker.worker_id) == col(Job.worker_id)
    )
    orphans = select(Job).where(col(Job.lease_id).is_not(None), ~with_worker.exists())
    jobs = list(await session.scalars(_locked(orphans)))
    await _release(session, jobs)
    await notify(session, POOLS_CHANGED, "all")
    return len(jobs)


async def _release(session: AsyncSession, jobs: list[Job]) -> None:
    for job in jobs:
        if job.worker_id is not None:
            await notify(session, LEASES_LOST, job.worker_id)
        job.lose()
        if job.is_ended:
            await notify(session, JOB_ENDED, str(job.id))
        else:
            await notify(session, JOBS_QUEUED, str(job.endpoint_id))


def _locked(query: Select[Job]) -> Select[Job]:
    return query.with_for_update(of=Job)
