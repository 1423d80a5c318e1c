"""One Work stream: what its worker says and is told, from its hello to its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import structlog

from esd.inference.v1 import inference_pb2 as pb
from esd.worker.v1 import worker_pb2
from services.common import validation
from services.common.errors import InvalidArgument, Unavailable
from services.common.notifications import Notifications
from services.common.tasks import first, heard, together
from services.inference.channels import JOBS_QUEUED, LEASES_LOST, MODELS_PINNED
from services.inference.peers import Model
from services.inference.queue.domain import Assignment, Queue, WorkerStream, parse_lease
from services.inference.queue.pins import Pins
from services.inference.queue.results import ResultObject, Results
from services.inference.rows import REAL_TIME
from services.inference.watching.hub import Hub
from services.inference.watching.relay import Relay

log = structlog.get_logger()

RECONNECT = "the service is stopping; connect again"


class WorkSession:
    """One Work stream: reads what the worker says, assigns when it wants, renews its leases, tells it what it lost."""

    def __init__(self, queue: Queue, pins: Pins, notifications: Notifications, hub: Hub, endpoint_id: UUID) -> None:
        self.outbox: asyncio.Queue[pb.WorkResponse | None] = asyncio.Queue()
        self._relay = Relay(hub, self._say_watched)
        self._queue = queue
        self._pins = pins
        self._notifications = notifications
        self._endpoint_id = endpoint_id
        self._num_wanted = 0
        self._warm_models: list[str] = []
        self._leases: set[UUID] = set()
        self._wake = asyncio.Event()  # there may be something to claim
        self._waiting: Assignment | None = None  # runs alone, so it is sent when the worker has ended all else

    async def run(self, requests: AsyncIterator[pb.WorkRequest], stopping: asyncio.Event) -> None:
        """Serves the stream until either side ends it; None in the outbox is its end."""
        try:
            stream = await self._welcome(requests)
            is_sent_away = False
            try:
                await self._serve(stream, requests, stopping)
            except Unavailable:  # we stop, or the database is away: the worker comes again within its leases' life
                is_sent_away = True
                raise
            finally:
                self._relay.close()
                if not is_sent_away:
                    self._queue.lose(stream, holds_leases=bool(self._leases))
        finally:
            self.outbox.put_nowait(None)

    async def _welcome(self, requests: AsyncIterator[pb.WorkRequest]) -> WorkerStream:
        hello = await validation.hello(requests, "Work")
        held = list(hello.held_leases)
        stream, kept = await self._queue.welcome(self._endpoint_id, hello.worker_id, held, hello.device, hello.version)
        self._leases = set(kept)
        self._send(welcome=pb.Welcome(kept_leases=[str(lease) for lease in kept]))
        if kept:
            await self._relay.keep(kept)
        log.info(
            "worker came", worker=stream.worker_id, endpoint=str(self._endpoint_id), kept=len(kept), shown=len(held)
        )
        return stream

    async def _serve(
        self, stream: WorkerStream, requests: AsyncIterator[pb.WorkRequest], stopping: asyncio.Event
    ) -> None:
        """Does everything at once until one of it ends."""
        woken_by = (JOBS_QUEUED, str(self._endpoint_id))
        with (
            self._notifications.subscribed(woken_by) as self._wake,
            self._notifications.subscribed((LEASES_LOST, stream.worker_id)) as lost,
            self._notifications.subscribed((MODELS_PINNED, str(self._endpoint_id))) as pinned,
        ):
            await first(
                self._read(stream, requests),
                self._assign(stream),
                self._renew(stream),
                self._watch_leases(stream, lost),
                self._watch_pins(pinned),
                stopping.wait(),
            )
        if stopping.is_set():
            raise Unavailable(RECONNECT)

    async def _read(self, stream: WorkerStream, requests: AsyncIterator[pb.WorkRequest]) -> None:
        """Takes what the worker says in its order, but for results: they are read back beside it, many at once."""
        async with together() as checks:
            async for request in requests:
                match request.WhichOneof("message"):
                    case "want":
                        validation.check(request)
                        self._num_wanted = request.want.num_jobs
                        self._warm_models = list(request.want.warm_models)
                        self._wake.set()
                        if self._num_wanted == 0 and self._waiting is not None:  # it may be about to stop
                            await self._give_back(stream, self._waiting.lease_id)
                    case "event" if request.event.event.HasField("done"):
                        checks.create_task(self._take_results(stream, request.event))
                    case "event":
                        await self._take_event(stream, request.event)
                    case other:
                        raise InvalidArgument(f"a Work stream does not go on with {other}")

    async def _take_results(self, stream: WorkerStream, leased: pb.LeasedEvent) -> None:
        """Reads results back, until it can: a stream that ended for it would be opened again, to be told the same."""
        lease_id = parse_lease(leased.lease_id)
        while True:
            try:
                recorded = await self._queue.succeed(stream, lease_id, _results(leased.event.done))
            except Unavailable as error:
                log.warning("results wait to be read back", lease=str(lease_id), reason=str(error))
                await asyncio.sleep(self._queue.limits.retry_seconds)
            else:
                self._end(lease_id, recorded)
                return

    async def _take_event(self, stream: WorkerStream, leased: pb.LeasedEvent) -> None:
        lease_id = parse_lease(leased.lease_id)
        match leased.event.WhichOneof("event"):
            case "started":
                if await self._queue.start(stream, lease_id):
                    self._relay.tell(lease_id, leased.event)
                else:
                    self._take_back(lease_id)
            case "failed" if leased.event.failed.cancelled:
                # Nobody told the worker to, or the lease would be lost by now: it stops, and the job goes to others.
                await self._give_back(stream, lease_id)
                self._end(lease_id, recorded=True)
            case "failed" if leased.event.failed.postponed:
                self._drop(lease_id)  # first, as its loss will be notified
                self._end(lease_id, await self._queue.postpone(stream, lease_id, leased.event.failed.reason))
            case "failed" if leased.event.failed.declined:
                self._drop(lease_id)
                self._end(lease_id, await self._queue.decline(stream, lease_id, leased.event.failed.reason))
            case "failed":
                failed = leased.event.failed
                recorded = await self._queue.fail(
                    stream, lease_id, failed.reason, nothing_uploaded=failed.nothing_uploaded
                )
                self._end(lease_id, recorded)
            case _:
                self._relay.tell(lease_id, leased.event)

    async def _assign(self, stream: WorkerStream) -> None:
        while True:
            has_all = False  # that waits, as far as others have it not locked
            while self._num_wanted > 0 and not has_all:
                assignments, has_all = await self._queue.claim(stream, self._num_wanted, self._warm_models)
                self._num_wanted -= len(assignments)
                for assignment in assignments:
                    self._leases.add(assignment.lease_id)
                    if assignment.job.is_last_attempt:
                        self._waiting = assignment
                    else:
                        self._hand_over(assignment)
            await self._hand_over_waiting(stream)
            contended = self._num_wanted > 0 and await self._queue.is_contended(stream)
            # Nothing tells when another transaction lets go of a job without taking it, so that is tried again soon.
            limits = self._queue.limits
            await heard(self._wake, limits.contended_seconds if contended else limits.sweep_seconds)

    async def _renew(self, stream: WorkerStream) -> None:
        while True:
            await asyncio.sleep(self._queue.limits.renew_seconds)
            if not await self._queue.renew(stream):
                raise Unavailable("the worker has another stream, or was away for too long; connect again")

    async def _watch_leases(self, stream: WorkerStream, lost: asyncio.Event) -> None:
        while True:
            await lost.wait()
            lost.clear()
            before = set(self._leases)
            for lease_id in before - await self._queue.leases(stream):
                if lease_id in self._leases:  # else it ended in the meantime
                    self._take_back(lease_id)

    async def _watch_pins(self, pinned: asyncio.Event) -> None:
        """Tells the worker which models to keep ready, now and when others are pinned."""
        told: list[str] = []
        while True:
            try:
                files = await self._pins.files(self._endpoint_id)
            except Unavailable as error:
                log.warning("a worker is not told what is pinned yet", error=str(error))
                await heard(pinned, self._queue.limits.sweep_seconds)
                continue
            if (keys := [model.cache_key for model, _ in files]) != told:
                self._send(preload=pb.Preload(models=[_model_file(*file) for file in files]))
                told = keys
            await pinned.wait()
            pinned.clear()

    def _end(self, lease_id: UUID, recorded: bool) -> None:
        if recorded:
            self._send(acknowledge=pb.Acknowledge(lease_id=str(lease_id)))
            self._drop(lease_id)
        else:
            self._take_back(lease_id)

    def _take_back(self, lease_id: UUID) -> None:
        self._send(cancel=pb.Cancel(lease_id=str(lease_id)))
        self._drop(lease_id)

    async def _give_back(self, stream: WorkerStream, lease_id: UUID) -> None:
        """Others may have a job that its worker does not go on with, or was not told of."""
        self._drop(lease_id)
        await self._queue.give_back(stream, lease_id)

    def _drop(self, lease_id: UUID) -> None:
        """The worker holds a lease no more. With its last one, or the one that waits, goes what kept others from it."""
        self._leases.discard(lease_id)
        self._relay.drop(lease_id)
        if self._waiting is not None and self._waiting.lease_id == lease_id:
            self._waiting = None
            self._wake.set()
        if not self._leases or (self._waiting is not None and len(self._leases) == 1):
            self._wake.set()

    def _hand_over(self, assignment: Assignment) -> None:
        self._send(assign=_assign(assignment))
        self._relay.take(assignment.lease_id, assignment.job.id)  # which may say that it is watched

    async def _hand_over_waiting(self, stream: WorkerStream) -> None:
        """Once the worker has nothing else. It may have changed its mind while that is noted."""
        waiting = self._waiting
        if waiting is None or self._leases != {waiting.lease_id}:
            return
        if await self._queue.entrust(stream, waiting.lease_id) and self._waiting is waiting:
            self._waiting = None
            self._hand_over(waiting)

    def _say_watched(self, lease_id: UUID, is_watched: bool) -> None:
        self._send(watched=pb.Watched(lease_id=str(lease_id), is_watched=is_watched))

    def _send(self, **message: Any) -> None:
        self.outbox.put_nowait(pb.WorkResponse(**message))


def _result_object(told: worker_pb2.ResultObject) -> ResultObject:
    return ResultObject(told.name, told.size_bytes, told.sha256)


def _results(done: worker_pb2.JobDone) -> Results:
    """What a worker tells of its results; what is wrong with their names fails the job.

    Raises:
        InvalidArgument: a timing is no number.
    """
    validation.check(done.timings)
    return Results(
        images=[_result_object(image) for image in done.images],
        param=_result_object(done.param),
        timings={
            "fetch_seconds": done.timings.fetch_seconds,
            "load_seconds": done.timings.load_seconds,
            "pipeline_seconds": done.timings.pipeline_seconds,
            "encode_seconds": done.timings.encode_seconds,
            "upload_seconds": done.timings.upload_seconds,
        },
    )


def _model_file(model: Model, url: str) -> worker_pb2.ModelFile:
    return worker_pb2.ModelFile(
        type=model.type,
        name=model.name,
        url=url,
        size_bytes=model.size_bytes,
        cache_key=model.cache_key,
        sha256=model.sha256,
    )


def _assign(assignment: Assignment) -> pb.Assign:
    job = assignment.job
    spec = worker_pb2.JobSpec(
        job_id=str(job.id),
        task_type=job.task_type,
        payload_url=assignment.payload_url,
        payload_sha256=(job.payload_sha256 or "") if assignment.payload_url else "",
        models=[_model_file(*file) for file in assignment.models],
        image_uploads=[worker_pb2.Upload(name=name, url=url) for name, url in assignment.image_uploads],
        param_upload=worker_pb2.Upload(name=assignment.param_upload[0], url=assignment.param_upload[1]),
        endpoint_name=job.endpoint_name,
        is_real_time=job.inference_type == REAL_TIME,
    )
    if job.payload is not None:
        spec.payload.update(job.payload)
    return pb.Assign(lease_id=str(assignment.lease_id), spec=spec)
