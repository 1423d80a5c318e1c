"""The workers' side of the jobs: leases, results that count once, jobs whose worker went away."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import PurePosixPath
from uuid import UUID, uuid4

import structlog

from services.common.blobs import Blobs
from services.common.errors import InvalidArgument, Unavailable
from services.common.leftovers import WRITABLE_SECONDS, LeftoverStore
from services.common.sentences import MAX_REASON, printable
from services.common.tasks import Background
from services.inference.peers import Model
from services.inference.queue.claim import WARM_WINDOW
from services.inference.queue.results import Results, find_problem
from services.inference.queue.store import LeaseStore, Seen
from services.inference.rows import Job, Worker, lease_prefix, now
from services.inference.upkeep.outputs import Outputs

log = structlog.get_logger()

_URL_SECONDS = WRITABLE_SECONDS  # a worker may wait with a job, and works at it for long


@dataclass(frozen=True)
class Limits:
    """How long the queue is patient, in seconds."""

    lease_seconds: float = 30.0  # of silence, until what a worker holds is given to others
    renew_seconds: float = 5.0
    grace_seconds: float = 5.0  # for a worker whose stream broke to come back
    sweep_seconds: float = 7.0  # the safety net under every notification
    contended_seconds: float = 0.1  # until a claim that met only locked rows tries again
    retry_seconds: float = 2.0  # until results are read back again when a store did not answer
    outage_seconds: float = 24 * 3600.0  # of an object store that workers do not reach, until a job fails of it


@dataclass(frozen=True)
class WorkerStream:
    """One stream of one worker."""

    endpoint_id: UUID
    worker_id: str
    stream_id: UUID


@dataclass(frozen=True)
class Assignment:
    """A leased job with the URLs that its worker needs."""

    job: Job
    lease_id: UUID
    payload_url: str
    models: list[tuple[Model, str]]
    image_uploads: list[tuple[str, str]]
    param_upload: tuple[str, str]


class Queue:
    """Hands jobs to workers and takes their results."""

    def __init__(
        self,
        store: LeaseStore,
        blobs: Blobs,
        leftovers: LeftoverStore,
        outputs: Outputs,
        background: Background,
        limits: Limits,
    ) -> None:
        self.limits = limits
        self._store = store
        self._blobs = blobs
        self._leftovers = leftovers
        self._outputs = outputs
        self._background = background

    # --- a worker's stream ---

    async def welcome(
        self, endpoint_id: UUID, worker_id: str, held_leases: list[str], device: str, version: str
    ) -> tuple[WorkerStream, list[UUID]]:
        """Takes in a worker, new or come back; answers its stream and those leases that are still its own.

        Raises:
            InvalidArgument: the id of a lease is malformed.
        """
        stream = WorkerStream(endpoint_id, worker_id, uuid4())
        worker = Worker(
            endpoint_id=endpoint_id,
            worker_id=worker_id,
            stream_id=stream.stream_id,
            device=device,
            version=version,
            last_seen=now(),
        )
        return stream, await self._store.welcome(worker, [parse_lease(lease) for lease in held_leases])

    async def claim(self, stream: WorkerStream, num_jobs: int, warm_models: list[str]) -> tuple[list[Assignment], bool]:
        """Leases up to so many jobs to the worker; also says whether that was all that could be had."""
        jobs = await self._store.claim(stream.endpoint_id, stream.worker_id, stream.stream_id, num_jobs, warm_models)
        return [self._assignment(job) for job in jobs], len(jobs) < min(num_jobs, WARM_WINDOW)

    async def is_contended(self, stream: WorkerStream) -> bool:
        """Whether a claim came back empty only because other transactions had the jobs locked."""
        return await self._store.has_queued(stream.endpoint_id, stream.worker_id)

    async def renew(self, stream: WorkerStream) -> bool:
        """Keeps the worker's leases alive; False when the stream does not speak for the worker any more."""
        return await self._store.renew(stream.endpoint_id, stream.worker_id, stream.stream_id)

    async def leases(self, stream: WorkerStream) -> set[UUID]:
        """What the worker holds."""
        return await self._store.leases(stream.endpoint_id, stream.worker_id)

    async def leave(self, stream: WorkerStream) -> None:
        """Takes back what the worker held, unless it has another stream."""
        num_jobs = await self._store.leave(stream.endpoint_id, stream.worker_id, stream.stream_id)
        log.info("worker left", worker=stream.worker_id, endpoint=str(stream.endpoint_id), jobs_taken_back=num_jobs)

    def lose(self, stream: WorkerStream, *, holds_leases: bool) -> None:
        """A stream ended. A worker that holds jobs has the grace to come back before they are given to others."""

        async def take_back() -> None:
            if holds_leases:
                await asyncio.sleep(self.limits.grace_seconds)
            await self.leave(stream)

        self._background.run(take_back())

    # --- a job's events ---

    async def start(self, stream: WorkerStream, lease_id: UUID) -> bool:
        """The worker has begun; False when the lease is lost."""
        return await self._store.start(stream.endpoint_id, lease_id)

    async def entrust(self, stream: WorkerStream, lease_id: UUID) -> bool:
        """The worker is given a job on its last attempt; False when the lease is lost, or it still has another one."""
        return await self._store.entrust(stream.endpoint_id, lease_id)

    async def succeed(self, stream: WorkerStream, lease_id: UUID, results: Results) -> bool:
        """Checks and records results; True once they are (or were) recorded, False when the lease is lost.

        Raises:
            Unavailable: the object store or the database is down; it may be tried again.
        """
        job = await self._store.find_by_lease(lease_id)
        if job is None:
            self._background.run(self._remove_lost(lease_id, results.param.name))
        if job is None or job.endpoint_id != stream.endpoint_id:
            return False
        if job.result_lease == lease_id:
            return True
        began = now()
        if problem := await find_problem(self._blobs, job, lease_id, results):
            return await self.fail(stream, lease_id, problem)
        timings = {**results.timings, "check_seconds": (now() - began).total_seconds()}
        objects = [found.as_dict() for found in [*results.images, results.param]]
        ended = await self._store.succeed(stream.endpoint_id, lease_id, objects, timings)
        if ended is not None:
            self._background.run(self._outputs.write(ended))
            return True
        again = await self._store.find_by_lease(lease_id)
        if again is not None and again.result_lease == lease_id:
            return True  # the worker told twice at once, and the other telling was recorded
        self._background.run(self._remove_lost(lease_id, results.param.name))
        return False

    async def fail(self, stream: WorkerStream, lease_id: UUID, reason: str, *, nothing_uploaded: bool = False) -> bool:
        """Records that a job failed; False when the lease is lost."""
        reason = printable(reason, MAX_REASON) or "the worker gave no reason"
        job = await self._store.fail(stream.endpoint_id, lease_id, reason, leaves_objects=not nothing_uploaded)
        if job is not None:
            log.info("job failed", job=str(job.id), reason=job.failure)
        return job is not None

    async def give_back(self, stream: WorkerStream, lease_id: UUID) -> bool:
        """The worker stops with a job that nobody told it to stop: others may have it. False when the lease is lost."""
        return await self._store.give_back(stream.endpoint_id, lease_id)

    async def decline(self, stream: WorkerStream, lease_id: UUID, reason: str) -> bool:
        """The worker's disk has no room for the job: another one may, or it fails. False when the lease is lost."""
        job = await self._store.decline(stream.endpoint_id, lease_id, printable(reason, MAX_REASON))
        if job is not None:
            log.warning("job declined", job=str(job.id), worker=stream.worker_id, reason=reason, status=job.status)
        return job is not None

    async def postpone(self, stream: WorkerStream, lease_id: UUID, reason: str) -> bool:
        """The worker cannot reach the object store: the job is tried again, until that has taken too long. False when
        the lease is lost."""
        reason = printable(reason, MAX_REASON)
        job = await self._store.postpone(stream.endpoint_id, lease_id, reason, self.limits.outage_seconds)
        if job is not None:
            log.warning("job postponed", job=str(job.id), reason=reason, status=job.status)
        return job is not None

    # --- the background ---

    async def run(self) -> None:
        """Takes back jobs of lost workers, until cancelled.

        Lost is who was not renewed over so many looks in a row that its leases are over. A clock would count the time
        in which nobody could be, since this machine slept or the database stood still.
        """
        num_looks: dict[Seen, int] = {}
        while True:
            await asyncio.sleep(self.limits.renew_seconds)
            try:
                num_looks = {seen: num_looks.get(seen, 0) + 1 for seen in await self._store.seen()}
                max_looks = self.limits.lease_seconds / self.limits.renew_seconds
                await self._store.reap([seen for seen, number in num_looks.items() if number > max_looks])
            except Unavailable as error:
                num_looks.clear()
                log.warning("jobs of lost workers wait", reason=str(error))

    def _assignment(self, job: Job) -> Assignment:
        lease_id = job.lease_id
        if lease_id is None:
            raise AssertionError("a claimed job has a lease")
        prefix = job.lease_prefix(lease_id)
        models = [Model(**model) for model in job.models]
        return Assignment(
            job=job,
            lease_id=lease_id,
            payload_url=self._blobs.presign_get(job.frozen_key, _URL_SECONDS) if job.payload is None else "",
            models=[(model, self._blobs.presign_get(model.key, _URL_SECONDS)) for model in models if model.key],
            image_uploads=[(name, self._blobs.presign_put(prefix + name, _URL_SECONDS)) for name in job.result_names],
            param_upload=(job.param_name, self._blobs.presign_put(prefix + job.param_name, _URL_SECONDS)),
        )

    async def _remove_lost(self, lease_id: UUID, param_name: str) -> None:
        """Has removed what was uploaded under a lease that counts for no job; the worker's words tell whose it was."""
        if await self._store.find_by_lease(lease_id) is not None:
            return
        stem = PurePosixPath(param_name).name.removesuffix("_param.json")
        try:
            job_id = UUID(stem)
        except ValueError:
            return
        await self._leftovers.add([lease_prefix(job_id, lease_id)])


def parse_lease(text: str) -> UUID:
    """The id of a lease.

    Raises:
        InvalidArgument: it is none.
    """
    try:
        return UUID(text)
    except ValueError:
        raise InvalidArgument(f"lease {text!r} is no UUID") from None
