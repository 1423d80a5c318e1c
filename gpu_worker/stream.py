"""The worker's end of the queue's Work stream: takes jobs under leases, tells their events, survives a broken stream.

A lease is held from its assignment until the service acknowledges the job's last event or takes the job back. Jobs run
on while the stream is down; the next Hello shows their leases, and last events are told again until acknowledged.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import Any

import grpc
import structlog

from esd.inference.v1 import inference_pb2, inference_pb2_grpc
from esd.worker.v1 import worker_pb2
from gpu_worker import VERSION
from gpu_worker.job import Job
from gpu_worker.worker import Worker, is_last
from services.common.auth import TOKEN_METADATA
from services.common.clients import TokenSource

log = structlog.get_logger()

MAX_DELAY_SECONDS = 2.0
_FIRST_DELAY_SECONDS = 0.1
_CLOSING_SECONDS = 2.0
_REFUSALS = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


class Refused(Exception):
    """Identity does not know this worker's secret: its endpoint is gone."""


@dataclass
class _Lease:
    """A job under a lease, and those of its events that the service must know: that it started, and how it ended."""

    job: Job
    started: worker_pb2.JobEvent | None = None
    last: worker_pb2.JobEvent | None = None
    taken_back: bool = False


class WorkStream:
    """Keeps the stream for as long as the worker lives."""

    def __init__(self, worker: Worker, tokens: TokenSource, channel: grpc.aio.Channel, worker_id: str) -> None:
        self._worker = worker
        self._tokens = tokens
        self._stub = inference_pb2_grpc.QueueServiceStub(channel)
        self._worker_id = worker_id
        self._leases: dict[str, _Lease] = {}
        # What goes to the service on the present stream; None ends it. No queue: no stream, or none welcomed yet.
        self._outbox: asyncio.Queue[inference_pb2.WorkRequest | None] | None = None
        self._wanted: inference_pb2.Want | None = None
        self._draining = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._left = asyncio.Event()
        self._delay_seconds = _FIRST_DELAY_SECONDS
        self._conversation: asyncio.Task[None] | None = None
        worker.on_change = self._say_want

    async def run(self) -> None:
        """Serves the queue until the worker is drained.

        Raises:
            Refused: the worker's secret is not known any more.
        """
        drain = asyncio.create_task(self._leave_when_drained())
        try:
            while not self._left.is_set():
                self._conversation = asyncio.create_task(self._converse())
                try:
                    await self._conversation
                except asyncio.CancelledError:
                    if not self._left.is_set():
                        raise
                except grpc.aio.AioRpcError as error:
                    if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                        self._tokens.forget()  # identity says whether the secret is still good
                    log.warning("the queue is not reached", code=error.code().name, details=error.details())
                await self._back_off()
        finally:
            drain.cancel()
            if self._conversation is not None:
                self._conversation.cancel()
                await asyncio.gather(self._conversation, return_exceptions=True)

    def drain(self) -> None:
        """Takes no more jobs, and makes run() return when those held have ended and are acknowledged."""
        self._draining.set()
        self._say_want()

    async def _leave_when_drained(self) -> None:
        await self._draining.wait()
        await self._idle.wait()
        self._left.set()
        if self._outbox is not None:
            self._outbox.put_nowait(None)
        elif self._conversation is not None:
            self._conversation.cancel()  # not welcomed yet: there is nothing to take leave from

    async def _back_off(self) -> None:
        """Waits before the next attempt, with jitter so that a service's workers do not return all at once."""
        delay = self._delay_seconds * random.uniform(0.5, 1.0)  # noqa: S311
        self._delay_seconds = min(2 * self._delay_seconds, MAX_DELAY_SECONDS)
        try:
            async with asyncio.timeout(delay):
                await self._left.wait()
        except TimeoutError:
            return

    async def _converse(self) -> None:
        """One stream, from Hello to its end."""
        try:
            token = await self._tokens.token()
        except grpc.aio.AioRpcError as error:
            if error.code() in _REFUSALS:
                raise Refused(error.details()) from None
            raise
        call = self._stub.Work(metadata=((TOKEN_METADATA, token),))
        outbox: asyncio.Queue[inference_pb2.WorkRequest | None] = asyncio.Queue()
        outbox.put_nowait(inference_pb2.WorkRequest(hello=self._hello()))
        reader = asyncio.create_task(self._read(call, outbox))
        writer = asyncio.create_task(self._write(call, outbox))
        try:
            await asyncio.wait([reader, writer], return_when=asyncio.FIRST_COMPLETED)
            if not self._left.is_set():
                await reader  # what breaks a write breaks the read too, and that one knows why
        finally:
            self._outbox = None
            call.cancel()
            reader.cancel()
            writer.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)

    async def _read(
        self, call: grpc.aio.StreamStreamCall, outbox: asyncio.Queue[inference_pb2.WorkRequest | None]
    ) -> None:
        message: Any
        while (message := await call.read()) is not grpc.aio.EOF:
            self._receive(message, outbox)
        code = await call.code()
        log.info("the stream has ended", code=code.name)

    async def _write(
        self, call: grpc.aio.StreamStreamCall, outbox: asyncio.Queue[inference_pb2.WorkRequest | None]
    ) -> None:
        while (message := await outbox.get()) is not None:
            await call.write(message)
        await call.done_writing()
        await asyncio.sleep(_CLOSING_SECONDS)  # the service's time to end the stream in its own way

    def _hello(self) -> inference_pb2.Hello:
        held = [lease_id for lease_id, lease in self._leases.items() if not lease.taken_back]
        return inference_pb2.Hello(
            worker_id=self._worker_id, held_leases=held, device=self._worker.device, version=f"esd {VERSION}"
        )

    def _receive(
        self, message: inference_pb2.WorkResponse, outbox: asyncio.Queue[inference_pb2.WorkRequest | None]
    ) -> None:
        match message.WhichOneof("message"):
            case "welcome":
                self._begin(set(message.welcome.kept_leases), outbox)
            case "assign":
                self._take(message.assign)
            case "cancel":
                self._give_back(message.cancel.lease_id)
            case "acknowledge":
                self._forget(message.acknowledge.lease_id)
            case "watched":
                self._show(message.watched)
            case "preload":
                self._worker.preload(list(message.preload.models))

    def _begin(self, kept: set[str], outbox: asyncio.Queue[inference_pb2.WorkRequest | None]) -> None:
        """The stream is up: drops what is lost, tells last events again, and asks for work."""
        log.info("connected to the queue", num_held=len(kept))
        self._delay_seconds = _FIRST_DELAY_SECONDS
        self._outbox = outbox
        self._wanted = None
        self._worker.preload([])  # until this stream says so
        for lease_id, lease in list(self._leases.items()):
            lease.job.audience.is_watching = False  # until this stream says so
            if lease_id not in kept:
                self._give_back(lease_id)
                continue
            for event in (lease.started, lease.last):
                if event is not None:
                    self._send(inference_pb2.WorkRequest(event=_leased(lease_id, event)))
        if self._left.is_set():
            outbox.put_nowait(None)
        self._say_want()

    def _take(self, assign: inference_pb2.Assign) -> None:
        lease_id = assign.lease_id
        if lease_id in self._leases:
            return
        log.info("job taken", job_id=assign.spec.job_id, task=assign.spec.task_type)
        job = Job(assign.spec, lambda event: self._tell(lease_id, event))
        self._leases[lease_id] = _Lease(job)
        self._idle.clear()
        self._worker.submit(job)

    def _tell(self, lease_id: str, event: worker_pb2.JobEvent) -> None:
        """Sends a job's event. Progress is not kept for the next stream."""
        lease = self._leases[lease_id]
        if event.HasField("started"):
            lease.started = event
        if is_last(event):
            lease.last = event
        self._send(inference_pb2.WorkRequest(event=_leased(lease_id, event)))
        if lease.taken_back and lease.last is not None:
            self._forget(lease_id)

    def _give_back(self, lease_id: str) -> None:
        """The lease is lost: the job stops, and nobody waits for an acknowledgement."""
        lease = self._leases.get(lease_id)
        if lease is None:
            return
        lease.taken_back = True
        lease.job.cancel()
        if lease.last is not None:
            self._forget(lease_id)

    def _show(self, watched: inference_pb2.Watched) -> None:
        """Somebody looks at a job, or nobody does any more."""
        lease = self._leases.get(watched.lease_id)
        if lease is not None:
            lease.job.audience.is_watching = watched.is_watched

    def _forget(self, lease_id: str) -> None:
        self._leases.pop(lease_id, None)
        if not self._leases:
            self._idle.set()

    def _say_want(self) -> None:
        num_jobs = 0 if self._draining.is_set() else self._worker.room
        want = inference_pb2.Want(num_jobs=num_jobs, warm_models=sorted(self._worker.warm_models))
        if self._outbox is not None and want != self._wanted:
            self._wanted = want
            self._send(inference_pb2.WorkRequest(want=want))

    def _send(self, message: inference_pb2.WorkRequest) -> None:
        if self._outbox is not None:
            self._outbox.put_nowait(message)


def _leased(lease_id: str, event: worker_pb2.JobEvent) -> inference_pb2.LeasedEvent:
    return inference_pb2.LeasedEvent(lease_id=lease_id, event=event)
