"""Workers and their leases in PostgreSQL. One method is one transaction.

Who gets which job is decided in claim.py. Whatever a worker tells counts only under a lease that is its own now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import (
    Float,
    Select,
    Table,
    Text,
    Uuid,
    bindparam,
    case,
    cast,
    delete,
    func,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert

from services.common.database import Database, notify
from services.common.driver import Run
from services.common.leftovers import note_leftovers
from services.inference.channels import JOB_ENDED, JOBS_QUEUED, LEASES_LOST, POOLS_CHANGED
from services.inference.queue.claim import CLAIM, has_room, is_offered, of_stream
from services.inference.rows import Job, Worker
from services.inference.submitting.quotas import noting
from services.inference.table import JOB, QUEUED, UNDER_WAY, locked, read_job, read_jobs, save_job

_WORKER: Table = Worker.__table__  # type: ignore[attr-defined]
_ENDPOINT: Any = bindparam("endpoint", type_=Uuid)
_LEASE: Any = bindparam("lease", type_=Uuid)
_OF_STREAM = of_stream(_ENDPOINT, bindparam("worker"), bindparam("stream", type_=Uuid))
_LEASED_TO_WORKER = (
    (JOB.c.endpoint_id == _ENDPOINT) & (JOB.c.worker_id == bindparam("worker")) & JOB.c.lease_id.is_not(None)
)
# What the end of a job under its lease changes, beside the time: the one of its start is the database's too.
_ENDING = (
    *("status", "lease_id", "worker_id", "is_running", "timings"),
    *("result_lease", "result_objects", "image_names", "is_output_missing", "failure"),
)

_WORKER_ID: Any = bindparam("worker", type_=Text)
_ANY_QUEUED = (
    select(JOB.c.id)
    .where(JOB.c.endpoint_id == _ENDPOINT, QUEUED, is_offered(_WORKER_ID), has_room(_ENDPOINT, _WORKER_ID))
    .limit(1)
)
_WORKER_IDS = select(_WORKER.c.worker_id).where(_WORKER.c.endpoint_id == _ENDPOINT)
_UNDER_LEASE = select(JOB).where((JOB.c.lease_id == _LEASE) | (JOB.c.result_lease == _LEASE))
# The fence: what a worker tells of a lease counts only while it is held.
_HELD = (JOB.c.lease_id == _LEASE) & UNDER_WAY
_HELD_HERE = select(JOB).where(_HELD, JOB.c.endpoint_id == _ENDPOINT)
_HELD_HERE_LOCKED = locked(_HELD_HERE)
_NOW = select(func.clock_timestamp().label("time"))
_RUN = (
    update(JOB)
    .where(_HELD, JOB.c.endpoint_id == _ENDPOINT)
    .values(is_running=True, start_time=case((JOB.c.is_running, JOB.c.start_time), else_=func.clock_timestamp()))
    .returning(JOB.c.id)
)
_START = _RUN.values(postponed_since=None)  # its worker has what it needs of the object store
_BESIDE = JOB.alias("beside")
_RUN_ALONE = _RUN.where(
    ~select(_BESIDE.c.id)
    .where(_BESIDE.c.endpoint_id == _ENDPOINT, _BESIDE.c.worker_id == JOB.c.worker_id, _BESIDE.c.id != JOB.c.id)
    .where(_BESIDE.c.lease_id.is_not(None))
    .exists()
)
_HELLO = insert(_WORKER).values(
    endpoint_id=_ENDPOINT,
    worker_id=bindparam("worker"),
    stream_id=bindparam("stream", type_=Uuid),
    device=bindparam("told_device"),
    version=bindparam("told_version"),
    last_seen=func.clock_timestamp(),
)
_HELLO = _HELLO.on_conflict_do_update(
    index_elements=["endpoint_id", "worker_id"],
    set_={name: _HELLO.excluded[name] for name in ("stream_id", "device", "version", "last_seen")},
)
_OF_WORKER = locked(select(JOB).where(_LEASED_TO_WORKER))
_LEASES_OF_WORKER = select(JOB.c.lease_id).where(_LEASED_TO_WORKER)
_SEEN = update(_WORKER).values(last_seen=func.clock_timestamp()).where(_OF_STREAM).returning(_WORKER.c.worker_id)
_GONE = delete(_WORKER).where(_OF_STREAM).returning(_WORKER.c.worker_id)
_ALL_SEEN = select(_WORKER.c.endpoint_id, _WORKER.c.worker_id, _WORKER.c.last_seen)
_LOST = delete(_WORKER).where(
    _WORKER.c.endpoint_id == _ENDPOINT,
    _WORKER.c.worker_id == bindparam("worker"),
    _WORKER.c.last_seen == bindparam("time", type_=_WORKER.c.last_seen.type),
)
_ORPHANS = locked(
    select(JOB).where(
        JOB.c.lease_id.is_not(None),
        ~select(_WORKER.c.worker_id)
        .where(_WORKER.c.endpoint_id == JOB.c.endpoint_id, _WORKER.c.worker_id == JOB.c.worker_id)
        .exists(),
    )
)


def _end_statement() -> Select[Any]:
    """Writes how a job ended, if its lease still holds, with what it used; when it was, if it was so."""
    new: dict[str, Any] = {name: bindparam(f"new_{name}", type_=JOB.c[name].type) for name in _ENDING}
    new["complete_time"] = func.clock_timestamp()
    ended = update(JOB).where(_HELD).values(new).returning(JOB.c.id, JOB.c.owner, JOB.c.complete_time).cte("ended")
    seconds: Any = bindparam("used_seconds", type_=Float)
    used = noting(select(ended.c.owner, seconds.label("gpu_seconds")).where(seconds > 0)).cte("used")
    return select(ended.c.complete_time, func.pg_notify(JOB_ENDED, cast(ended.c.id, Text))).add_cte(used)


_END = _end_statement()


class Seen(NamedTuple):
    """A worker, and when it was renewed last."""

    endpoint_id: UUID
    worker_id: str
    last_seen: datetime


class LeaseStore:
    """The workers and what they hold."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def claim(
        self, endpoint_id: UUID, worker_id: str, stream_id: UUID, num_jobs: int, warm_models: Iterable[str]
    ) -> list[Job]:
        """Leases up to so many jobs of the endpoint to a worker, in one statement. Nothing for a superseded stream."""
        jobs = await read_jobs(
            self._database.run,
            CLAIM,
            endpoint=endpoint_id,
            worker=worker_id,
            stream=stream_id,
            num_jobs=num_jobs,
            warm_models=list(warm_models),
        )
        return sorted(jobs, key=lambda job: (job.priority_class, -job.priority, job.virtual_start))

    async def has_queued(self, endpoint_id: UUID, worker_id: str) -> bool:
        """Whether a job waits that the worker has room for. After a claim that found none: another transaction has it
        locked at present.
        """
        return bool(await self._database.run(_ANY_QUEUED, endpoint=endpoint_id, worker=worker_id))

    async def start(self, endpoint_id: UUID, lease_id: UUID) -> bool:
        """Notes that the holder of a lease has begun, told again it changes nothing; False when the lease is lost."""
        return bool(await self._database.run(_START, endpoint=endpoint_id, lease=lease_id))

    async def entrust(self, endpoint_id: UUID, lease_id: UUID) -> bool:
        """Notes that the holder of a lease has nothing else: from here on its loss is this job's. False when the lease
        is lost, or another one of the worker's is still to be given back."""
        return bool(await self._database.run(_RUN_ALONE, endpoint=endpoint_id, lease=lease_id))

    async def find_by_lease(self, lease_id: UUID) -> Job | None:
        """The job that is held, or was completed, under the lease."""
        return await read_job(self._database.run, _UNDER_LEASE, lease=lease_id)

    async def succeed(
        self, endpoint_id: UUID, lease_id: UUID, objects: list[dict[str, Any]], timings: dict[str, float]
    ) -> Job | None:
        """Completes the job that is held under the lease; None when the lease is lost."""
        job = await self._held(endpoint_id, lease_id)
        if job is None:
            return None
        used_seconds = timings.get("pipeline_seconds", job.running_seconds)
        job.succeed(objects, timings)
        return job if await _end(self._database.run, job, lease_id, used_seconds) else None

    async def fail(self, endpoint_id: UUID, lease_id: UUID, reason: str, *, leaves_objects: bool = True) -> Job | None:
        """Fails the job that is held under the lease; None when the lease is lost."""
        job = await self._held(endpoint_id, lease_id)
        if job is None:
            return None
        used_seconds = job.running_seconds
        job.fail(reason)
        async with self._database.atomic() as run:
            if not await _end(run, job, lease_id, used_seconds):
                return None
            if leaves_objects:
                await note_leftovers(run, [job.lease_prefix(lease_id)])
        return job

    async def give_back(self, endpoint_id: UUID, lease_id: UUID) -> bool:
        """Puts the job that is held under the lease back into the queue; False when the lease is lost."""
        async with self._database.atomic() as run:
            job = await read_job(run, _HELD_HERE_LOCKED, endpoint=endpoint_id, lease=lease_id)
            if job is not None:
                await _let_go(run, job, job.give_back)
            return job is not None

    async def decline(self, endpoint_id: UUID, lease_id: UUID, reason: str) -> Job | None:
        """The same where the worker has no room for it (`Job.decline`); None when the lease is lost."""
        async with self._database.atomic() as run:
            job = await read_job(run, _HELD_HERE_LOCKED, endpoint=endpoint_id, lease=lease_id)
            if job is not None:
                workers = {row["worker_id"] for row in await run(_WORKER_IDS, endpoint=endpoint_id)}
                await _let_go(run, job, lambda: job.decline(reason, workers))
            return job

    async def postpone(self, endpoint_id: UUID, lease_id: UUID, reason: str, max_seconds: float) -> Job | None:
        """The same where a worker cannot reach the object store (`Job.postpone`); None when the lease is lost."""
        async with self._database.atomic() as run:
            job = await read_job(run, _HELD_HERE_LOCKED, endpoint=endpoint_id, lease=lease_id)
            if job is not None:
                (now,) = await run(_NOW)
                await _let_go(run, job, lambda: job.postpone(reason, now["time"], max_seconds))
            return job

    async def welcome(self, worker: Worker, held_leases: list[UUID]) -> list[UUID]:
        """Binds a worker to its new stream; answers which leases it keeps and requeues what it does not know of."""
        async with self._database.atomic() as run:
            names = {"endpoint": worker.endpoint_id, "worker": worker.worker_id}
            told = {"told_device": worker.device, "told_version": worker.version}
            await run(_HELLO, **names, stream=worker.stream_id, **told)
            jobs = await read_jobs(run, _OF_WORKER, **names)
            await _release(run, [job for job in jobs if job.lease_id not in held_leases])
            await notify(run, POOLS_CHANGED, str(worker.endpoint_id))
            return [job.lease_id for job in jobs if job.lease_id is not None]

    async def renew(self, endpoint_id: UUID, worker_id: str, stream_id: UUID) -> bool:
        """Keeps all leases of a worker alive; False when another stream has taken over, or the worker was reaped."""
        return bool(await self._database.run(_SEEN, endpoint=endpoint_id, worker=worker_id, stream=stream_id))

    async def leases(self, endpoint_id: UUID, worker_id: str) -> set[UUID]:
        """The leases that a worker holds."""
        rows = await self._database.run(_LEASES_OF_WORKER, endpoint=endpoint_id, worker=worker_id)
        return {row["lease_id"] for row in rows}

    async def leave(self, endpoint_id: UUID, worker_id: str, stream_id: UUID) -> int:
        """Takes back what a worker held, unless it has come back by another stream; answers how many jobs."""
        async with self._database.atomic() as run:
            gone = await run(_GONE, endpoint=endpoint_id, worker=worker_id, stream=stream_id)
            return await _reap(run) if gone else 0

    async def seen(self) -> list[Seen]:
        """When each worker was renewed last."""
        return [Seen(**row) for row in await self._database.run(_ALL_SEEN)]

    async def reap(self, lost: list[Seen]) -> int:
        """Takes back what workers held that are gone, and these, unless they are renewed now; answers how many jobs."""
        async with self._database.atomic() as run:
            for seen in lost:
                await run(_LOST, endpoint=seen.endpoint_id, worker=seen.worker_id, time=seen.last_seen)
            return await _reap(run)

    async def _held(self, endpoint_id: UUID, lease_id: UUID) -> Job | None:
        return await read_job(self._database.run, _HELD_HERE, endpoint=endpoint_id, lease=lease_id)


async def _end(run: Run, job: Job, lease_id: UUID, used_seconds: float) -> bool:
    """Writes the end of a job that was held under the lease; False when the lease was lost meanwhile."""
    new = {f"new_{name}": getattr(job, name) for name in _ENDING}
    ended = await run(_END, lease=lease_id, used_seconds=used_seconds, **new)
    for row in ended:
        job.complete_time = row["complete_time"]
    return bool(ended)


async def _reap(run: Run) -> int:
    """Takes back the jobs whose worker is not there any more."""
    jobs = await read_jobs(run, _ORPHANS)
    await _release(run, jobs)
    await notify(run, POOLS_CHANGED, "all")
    return len(jobs)


async def _release(run: Run, jobs: list[Job]) -> None:
    for job in jobs:
        await _let_go(run, job, job.lose)


async def _let_go(run: Run, job: Job, change: Callable[[], None]) -> None:
    """Makes the change that takes the job from its worker, and tells who has to know."""
    if job.worker_id is not None and job.lease_id is not None:
        await notify(run, LEASES_LOST, job.worker_id)
        await note_leftovers(run, [job.lease_prefix(job.lease_id)])
    change()
    await save_job(run, job)
    if job.is_ended:
        await notify(run, JOB_ENDED, str(job.id))
    else:
        await notify(run, JOBS_QUEUED, str(job.endpoint_id))
