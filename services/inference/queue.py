"""The workers' side of the jobs: leases, results that count once, jobs whose worker or endpoint went away."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from uuid import UUID, uuid4

import structlog

from services.common.blobs import DAY, BlobNotFound, Blobs
from services.common.errors import EsdError, InvalidArgument, Unavailable
from services.inference.peers import Endpoint, Model, Peers
from services.inference.rows import ASYNC, Job, Worker, now
from services.inference.signals import Signals
from services.inference.store import JobStore

log = structlog.get_logger()

_URL_SECONDS = DAY  # a worker may wait with a job, and works at it for long


@dataclass(frozen=True)
class Limits:
    """How long the queue is patient, in seconds."""

    lease_seconds: float = 30.0  # of silence, until what a worker holds is given to others
    renew_seconds: float = 5.0
    grace_seconds: float = 5.0  # for a worker whose stream broke to come back
    sweep_seconds: float = 7.0  # the safety net under every notification


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


@dataclass(frozen=True)
class Results:
    """What a worker says that it has uploaded: (name, size in bytes) each, and where the job's time went."""

    images: list[tuple[str, int]]
    param: tuple[str, int]
    timings: dict[str, float]


class Queue:
    """Hands jobs to workers and takes their results."""

    def __init__(self, store: JobStore, blobs: Blobs, peers: Peers, signals: Signals, limits: Limits) -> None:
        self.limits = limits
        self._store = store
        self._blobs = blobs
        self._peers = peers
        self._signals = signals
        self._tasks: set[asyncio.Task[None]] = set()

    # --- a worker's stream ---

    async def welcome(
        self, endpoint_id: UUID, worker_id: str, held_leases: list[str], device: str, version: str
    ) -> tuple[WorkerStream, list[UUID]]:
        """Takes in a worker, new or come back; answers its stream and those leases that are still its own.

        Raises:
            InvalidArgument: an id is malformed.
        """
        if not worker_id:
            raise InvalidArgument("hello has no worker_id")
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

    async def claim(self, stream: WorkerStream, num_jobs: int, warm_models: list[str]) -> list[Assignment]:
        """Leases up to so many jobs to the worker."""
        jobs = await self._store.claim(stream.endpoint_id, stream.worker_id, stream.stream_id, num_jobs, warm_models)
        return [self._assignment(job) for job in jobs]

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

        self.in_background(take_back())

    # --- a job's events ---

    async def start(self, stream: WorkerStream, lease_id: UUID) -> bool:
        """The worker has begun; False when the lease is lost."""
        return await self._store.start(stream.endpoint_id, lease_id)

    async def succeed(self, stream: WorkerStream, lease_id: UUID, results: Results) -> bool:
        """Checks and records results; True once they are (or were) recorded, False when the lease is lost.

        Raises:
            Unavailable: the object store or the database is down; the worker will tell again.
        """
        job = await self._store.find_by_lease(lease_id)
        if job is None:
            self.in_background(self._remove_lost(lease_id, results.param[0]))
        if job is None or job.endpoint_id != stream.endpoint_id:
            return False
        if job.result_lease == lease_id:
            return True
        began = now()
        if problem := await self._problem(job, lease_id, results):
            return await self.fail(stream, lease_id, problem)
        timings = {**results.timings, "check_seconds": (now() - began).total_seconds()}
        names = [name for name, _ in results.images]
        ended = await self._store.succeed(stream.endpoint_id, lease_id, names, timings)
        if ended is not None:
            self._follow_up(ended)
            return True
        again = await self._store.find_by_lease(lease_id)
        if again is not None and again.result_lease == lease_id:
            return True  # the worker told twice at once, and the other telling was recorded
        self.in_background(self._remove_lost(lease_id, results.param[0]))
        return False

    async def fail(self, stream: WorkerStream, lease_id: UUID, reason: str) -> bool:
        """Records that a job failed; False when the lease is lost."""
        job = await self._store.fail(stream.endpoint_id, lease_id, reason or "the worker gave no reason")
        if job is not None:
            log.info("job failed", job=str(job.id), reason=job.failure)
            self.in_background(self._remove(job.lease_prefix(lease_id)))
        return job is not None

    # --- pools ---

    async def pools(self) -> dict[UUID, tuple[list[str], int, int]]:
        """Of each endpoint with workers or jobs under way: the workers' ids, how many jobs wait, how many are held."""
        return await self._store.pools()

    async def retire(self, endpoint_id: UUID, reason: str) -> tuple[int, int]:
        """Moves the queued jobs of an endpoint elsewhere or fails them; answers how many each.

        Jobs that come back to this queue later, from a worker that stops, go the same way at the next sweep.
        """
        await self._store.retire(endpoint_id, reason)
        moved = failed = 0
        while stranded := await self._store.stranded(endpoint_id):
            homes = _Homes(self._peers)
            for job, why in stranded:
                if await self._rehome(job, why, homes, revivable=False):
                    moved += 1
                else:
                    failed += 1
        return moved, failed

    # --- the background ---

    async def run(self) -> None:
        """Takes back jobs of lost workers and finds homes for stranded ones, until cancelled."""
        clock = asyncio.get_running_loop().time
        quiet_until = 0.0
        while True:
            await asyncio.sleep(self.limits.renew_seconds)
            try:
                # Nobody could renew while the database was away, so everybody gets a lease's time first.
                if clock() > max(quiet_until, self._signals.connected_at + self.limits.lease_seconds):
                    await self._store.reap(self.limits.lease_seconds)
                await self._rehome_stranded()
            except Unavailable as error:
                quiet_until = clock() + self.limits.lease_seconds
                log.warning("the queue's sweep waits", reason=str(error))

    async def _rehome_stranded(self) -> None:
        homes = _Homes(self._peers)
        for job, why in await self._store.stranded():
            try:
                await self._rehome(job, why, homes, revivable=True)
            except EsdError as error:  # one job's trouble is not the others'; the next sweep tries again
                log.warning("a stranded job waits", job=str(job.id), reason=str(error))

    def in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs a chore whose failure concerns nobody but the log."""

        async def run() -> None:
            try:
                await work
            except EsdError as error:
                log.warning("chore failed", reason=str(error))

        task = asyncio.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """Ends the chores under way."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _assignment(self, job: Job) -> Assignment:
        lease_id = job.lease_id
        if lease_id is None:
            raise AssertionError("a claimed job has a lease")
        prefix = job.lease_prefix(lease_id)
        models = [Model(**model) for model in job.models]
        image_names = [f"image_{number}.png" for number in range(job.num_images)]
        return Assignment(
            job=job,
            lease_id=lease_id,
            payload_url=self._blobs.presign_get(job.frozen_key, _URL_SECONDS) if job.payload is None else "",
            models=[(model, self._blobs.presign_get(model.key, _URL_SECONDS)) for model in models if model.key],
            image_uploads=[(name, self._blobs.presign_put(prefix + name, _URL_SECONDS)) for name in image_names],
            param_upload=(job.param_name, self._blobs.presign_put(prefix + job.param_name, _URL_SECONDS)),
        )

    async def _problem(self, job: Job, lease_id: UUID, results: Results) -> str:
        """What is wrong with the results, or nothing."""
        expected = [f"image_{number}.png" for number in range(job.num_images)]
        names = [name for name, _ in results.images]
        if names != expected or results.param[0] != job.param_name:
            return f"the worker's results are {names} with {results.param[0]}, not {expected} with {job.param_name}"
        prefix = job.lease_prefix(lease_id)
        checks = (self._problem_of(prefix, name, size) for name, size in [*results.images, results.param])
        return next((problem for problem in await asyncio.gather(*checks) if problem), "")

    async def _problem_of(self, prefix: str, name: str, size_bytes: int) -> str:
        try:
            found = await self._blobs.head(prefix + name)
        except BlobNotFound:
            return f"the worker's result {name} is not in the object store"
        if found.size_bytes != size_bytes:
            return (
                f"the worker's result {name} has {found.size_bytes} bytes in the object store instead of {size_bytes}"
            )
        return ""

    def _follow_up(self, job: Job) -> None:
        """What is nice to have after a success, off the path that somebody waits on."""
        if job.output_key is not None and job.inference_type == ASYNC:
            answer = {
                "inference_id": str(job.id),
                "image_names": job.image_names,
                "result": self._blobs.url(job.result_prefix),
            }
            self.in_background(self._blobs.put(job.output_key, json.dumps(answer).encode()))
        if job.num_claims > 1:
            self.in_background(self._remove_losers(job))

    async def _remove(self, prefix: str) -> None:
        await self._blobs.delete_prefix(prefix)

    async def _remove_losers(self, job: Job) -> None:
        """Removes what workers uploaded whose lease was lost."""
        for blob in await self._blobs.find(f"out/{job.id}/result/"):
            if not blob.key.startswith(job.result_prefix):
                await self._blobs.delete(blob.key)

    async def _remove_lost(self, lease_id: UUID, param_name: str) -> None:
        """Removes what was uploaded under a lease that counts for no job; the worker's words tell whose it was."""
        if await self._store.find_by_lease(lease_id) is not None:
            return
        stem = PurePosixPath(param_name).name.removesuffix("_param.json")
        try:
            job_id = UUID(stem)
        except ValueError:
            return
        await self._remove(f"out/{job_id}/result/{lease_id}/")

    async def _rehome(self, job: Job, reason: str, homes: _Homes, *, revivable: bool) -> bool:
        """Moves a stranded job to an endpoint that its owner may use, or fails it; True when it was moved."""
        usable = await homes.find(job.owner, job.inference_type)
        if revivable and any(endpoint.id == job.endpoint_id for endpoint in usable):
            await self._store.revive(job.endpoint_id)
            return True
        others = [endpoint for endpoint in usable if endpoint.id != job.endpoint_id]
        if not others:
            await self._store.fail_queued(job.id, reason or f"endpoint {job.endpoint_name} went away")
            return False
        new = random.choice(others)  # noqa: S311 - load, not secrets
        await self._store.move(job.id, (new.id, new.name, new.instance_type))
        return True


class _Homes:
    """The endpoints that a user's jobs of a type may run on; during one sweep each pair is asked for once."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._found: dict[tuple[str, str], list[Endpoint]] = {}

    async def find(self, owner: str, inference_type: str) -> list[Endpoint]:
        """The usable endpoints.

        Raises:
            Unavailable: a service does not answer.
        """
        pair = (owner, inference_type)
        if pair not in self._found:
            roles = await self._peers.find_roles(owner) or []
            self._found[pair] = await self._peers.find_endpoints(inference_type, owner, roles)
        return self._found[pair]


def parse_lease(text: str) -> UUID:
    """The id of a lease.

    Raises:
        InvalidArgument: it is none.
    """
    try:
        return UUID(text)
    except ValueError:
        raise InvalidArgument(f"lease {text!r} is no UUID") from None
