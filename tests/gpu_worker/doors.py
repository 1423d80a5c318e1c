"""Owns the other side of the worker's streams: an identity and a queue that a test drives by hand."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from esd.identity.v1 import identity_pb2, identity_pb2_grpc
from esd.inference.v1 import inference_pb2, inference_pb2_grpc
from esd.worker.v1 import worker_pb2

SECRET = "the secret"
PATIENCE_SECONDS = 120.0  # a worker imports torch first, which a busy machine takes its time for


class Identity(identity_pb2_grpc.IdentityServiceServicer):
    """Knows one secret, until it is told to forget it."""

    def __init__(self) -> None:
        self.knows = True

    async def IssueToken(self, request: identity_pb2.IssueTokenRequest, context: Any) -> Any:
        if not self.knows or request.secret != SECRET:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the secret is not known")
        return identity_pb2.IssueTokenResponse(token="a token", lifetime_seconds=300)


@dataclass
class Connection:
    """One Work stream as the service sees it."""

    context: Any
    over: asyncio.Event = field(default_factory=asyncio.Event)
    ended: bool = False  # by the worker
    seen: list[inference_pb2.WorkRequest] = field(default_factory=list)

    async def read(self) -> Any:
        """The worker's next message, or EOF."""
        message = await asyncio.wait_for(self.context.read(), PATIENCE_SECONDS)
        if message is grpc.aio.EOF:
            self.ended = True
            self.over.set()
        else:
            self.seen.append(message)
        return message

    async def until(self, kind: str) -> Any:
        """Reads up to the next message of this kind: hello, want, or an event's started, progress, done, failed."""
        while True:
            message = await self.read()
            assert message is not grpc.aio.EOF
            part = message.WhichOneof("message")
            if part == kind:
                return getattr(message, part)
            if part == "event" and message.event.event.WhichOneof("event") == kind:
                return message.event

    async def until_room(self) -> None:
        """Reads until the worker wants a job."""
        while (await self.until("want")).num_jobs < 1:
            pass

    async def send(self, **message: Any) -> None:
        """Says something to the worker."""
        await self.context.write(inference_pb2.WorkResponse(**message))

    async def welcome(self, *kept: str) -> inference_pb2.Hello:
        """Reads hello and answers it."""
        hello = await self.until("hello")
        await self.send(welcome=inference_pb2.Welcome(kept_leases=kept))
        return hello

    async def assign(self, lease_id: str, spec: worker_pb2.JobSpec) -> None:
        """Hands out a job."""
        await self.send(assign=inference_pb2.Assign(lease_id=lease_id, spec=spec))

    async def preload(self, *models: worker_pb2.ModelFile) -> None:
        """Names models to keep ready."""
        await self.send(preload=inference_pb2.Preload(models=models))

    async def acknowledge(self, lease_id: str) -> None:
        """Confirms a last event."""
        await self.send(acknowledge=inference_pb2.Acknowledge(lease_id=lease_id))

    def sever(self) -> None:
        """Breaks the stream."""
        self.over.set()


class Queue(inference_pb2_grpc.QueueServiceServicer):
    """Gives each Work stream to the test."""

    def __init__(self) -> None:
        self._connections: asyncio.Queue[Connection] = asyncio.Queue()

    async def connection(self) -> Connection:
        """The next stream that a worker opens."""
        return await asyncio.wait_for(self._connections.get(), PATIENCE_SECONDS)

    async def Work(self, request_iterator: Any, context: Any) -> None:
        connection = Connection(context)
        assert ("x-esd-token", "a token") in tuple(context.invocation_metadata())
        self._connections.put_nowait(connection)
        await connection.over.wait()
        if connection.ended:
            return
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the service leaves")


@dataclass
class Services:
    """Both services behind one address, as behind the gateway."""

    address: str
    identity: Identity
    queue: Queue


@asynccontextmanager
async def services() -> AsyncIterator[Services]:
    """Both services on a port of their own."""
    server = grpc.aio.server()
    identity, queue = Identity(), Queue()
    identity_pb2_grpc.add_IdentityServiceServicer_to_server(identity, server)
    inference_pb2_grpc.add_QueueServiceServicer_to_server(queue, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield Services(f"127.0.0.1:{port}", identity, queue)
    await server.stop(None)
