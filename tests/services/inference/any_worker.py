"""Owns a worker of the queue that does what a test says in any order, and judges what it is told."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import grpc

from esd.inference.v1 import inference_pb2 as pb
from tests.services.inference.conftest import PNG, Service

STOPPED = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}  # how calls to a replica end that stops
WRITE_FAILED = "Internal error from Core"  # how this side may see it, where it was about to write


@dataclass
class AnyWorker:
    """The processes that have a worker's name, one after the other. Each stream has one task that reads it."""

    name: str
    endpoint_id: str
    tasks: asyncio.TaskGroup
    held: dict[str, Any] = field(default_factory=dict)  # by lease, what the present process knows that it has
    known: dict[str, Any] = field(default_factory=dict)  # what any of them ever had
    begun: set[str] = field(default_factory=set)  # leases that were said to have started
    last_words: dict[str, str] = field(default_factory=dict)  # by lease; they stay the same, however often told
    recorded: set[str] = field(default_factory=set)  # leases whose last words were acknowledged
    calls: list[Any] = field(default_factory=list)  # its streams, of which only the last one is heard
    outbox: asyncio.Queue[pb.WorkRequest | None] | None = None  # of that one, when it was welcomed; None ends it
    has_ended: bool = True
    news: asyncio.Event = field(default_factory=asyncio.Event)

    async def connect(self, service: Service, *, is_new: bool = False) -> None:
        """Opens a stream, as a new process or the same one. One that is open is not heard any more, nor closed."""
        if is_new:
            self.held.clear()
        self.outbox, self.has_ended = None, False
        self.calls.append(service.queue.Work(metadata=service.tokens.worker(self.endpoint_id)))
        self.tasks.create_task(self._read(self.calls[-1]))
        while self.outbox is None and not self.has_ended:
            self.news.clear()
            await self.news.wait()

    def say(self, **message: Any) -> None:
        if self.outbox is not None:
            self.outbox.put_nowait(pb.WorkRequest(**message))

    def tell(self, lease_id: str, **event: Any) -> None:
        self.say(event={"lease_id": lease_id, "event": event})

    def begin(self, lease_id: str) -> None:
        self.begun.add(lease_id)
        self.tell(lease_id, started={})
        self.tell(lease_id, progress={"step": 1, "num_steps": 2})

    def close(self) -> None:
        """Says that it wants no more, and nothing after that."""
        self.say(want={"num_jobs": 0})
        if self.outbox is not None:
            self.outbox.put_nowait(None)

    async def end(self, service: Service, lease_id: str, how: str) -> None:
        """Says last words: done, failed, cancelled, postponed or declined."""
        how, spec = self.last_words.setdefault(lease_id, how), self.known[lease_id].spec
        if how == "done":
            content = result_of(lease_id)
            for place in [*spec.image_uploads, spec.param_upload]:
                (await service.http.put(place.url, content=content)).raise_for_status()
            told = {"size_bytes": len(content), "sha256": sha256(content).hexdigest()}
            images = [{"name": place.name, **told} for place in spec.image_uploads]
            self.tell(lease_id, done={"images": images, "param": {"name": spec.param_upload.name, **told}})
        else:
            flags = {} if how == "failed" else {how: True}
            self.tell(lease_id, failed={"reason": f"{lease_id} broke", **flags})

    async def work(self, service: Service) -> None:
        """Does all that there is to do, until cancelled."""
        while True:
            if self.has_ended:
                await self.connect(service)
            for lease_id in list(self.held):
                self.begin(lease_id)
                await self.end(service, lease_id, "done")
            self.say(want={"num_jobs": 3})
            await self.news.wait()
            self.news.clear()

    async def _read(self, call: Any) -> None:
        outbox: asyncio.Queue[pb.WorkRequest | None] = asyncio.Queue()
        outbox.put_nowait(pb.WorkRequest(hello={"worker_id": self.name, "held_leases": list(self.held)}))
        writer = self.tasks.create_task(self._write(call, outbox))
        try:
            async for message in call:
                if call is self.calls[-1]:
                    self._hear(message, outbox)
        except grpc.aio.AioRpcError as error:
            assert error.code() in STOPPED or error.details() == WRITE_FAILED, error  # noqa: PT017
        except asyncio.CancelledError:
            if not call.cancelled():
                raise
        writer.cancel()
        if call is self.calls[-1]:
            self.outbox, self.has_ended = None, True
            self.news.set()

    async def _write(self, call: Any, outbox: asyncio.Queue[pb.WorkRequest | None]) -> None:
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # what ends the stream is for its reader
            while message := await outbox.get():
                await call.write(message)
            await call.done_writing()

    def _hear(self, message: Any, outbox: asyncio.Queue[pb.WorkRequest | None]) -> None:
        match message.WhichOneof("message"):
            case "welcome":
                self.outbox = outbox
                self.held = {lease_id: self.held[lease_id] for lease_id in message.welcome.kept_leases}
            case "assign":
                lease_id = message.assign.lease_id
                assert lease_id not in self.known
                self.held[lease_id] = self.known[lease_id] = message.assign
            case "cancel":
                self.held.pop(message.cancel.lease_id, None)
            case "acknowledge":
                self.held.pop(message.acknowledge.lease_id, None)
                self.recorded.add(message.acknowledge.lease_id)
        self.news.set()


def result_of(lease_id: str) -> bytes:
    """What a job's worker delivers."""
    return PNG + lease_id.encode()
