"""The trainer's end of the Train stream: numbered events that are told until they are kept, and URLs when they are
needed. A broken stream is opened again; the training goes on meanwhile.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import grpc
import structlog

from esd.training.v1 import training_pb2 as pb
from esd.training.v1 import training_pb2_grpc
from gpu_worker import VERSION
from services.common.auth import TOKEN_METADATA
from services.common.clients import TokenSource

log = structlog.get_logger()

MAX_DELAY_SECONDS = 2.0
_FIRST_DELAY_SECONDS = 0.1
_MAX_REPEATS = 100  # of what the service cannot take, in some minutes, until the training fails of it
_URL_SECONDS = 30.0  # after which URLs are asked for again; it is long for an answer
# The training is gone, has ended, or is another trainer's.
_ENDS = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT)
_REFUSALS = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


class Dismissed(Exception):
    """The service has no more use for this trainer; the message says why."""


class Superseded(Dismissed):
    """Another trainer goes on with the training."""


class TrainStream:
    """Keeps the stream for as long as the trainer lives. `on_stop` is called when the training shall stop."""

    def __init__(
        self, tokens: TokenSource, channel: grpc.aio.Channel, device: str, on_stop: Callable[[], None]
    ) -> None:
        self._tokens = tokens
        self._stub = training_pb2_grpc.TrainerServiceStub(channel)
        self._hello = pb.TrainerHello(session=str(uuid4()), device=device, version=f"esd {VERSION}")
        self._on_stop = on_stop
        self._welcome: asyncio.Future[pb.TrainerWelcome] = asyncio.get_running_loop().create_future()
        self._unkept: deque[pb.TrainerEvent] = deque()
        self._num_told = 0
        self._all_kept = asyncio.Event()
        self._all_kept.set()
        self._wants: dict[int, tuple[pb.UrlsWanted, asyncio.Future[list[str]]]] = {}
        self._num_wants = 0
        self._num_repeats = 0
        self._has_failed = False
        self._outbox: asyncio.Queue[pb.TrainRequest] | None = None  # None: no stream, or none welcomed yet

    async def run(self) -> None:
        """Keeps the stream until cancelled.

        Raises:
            Dismissed: the training is gone or has ended; Superseded: it is another trainer's.
            grpc.aio.AioRpcError: the service fails again and again, even at hearing that.
        """
        delay = _FIRST_DELAY_SECONDS
        while True:
            try:
                await self._converse()
                delay = _FIRST_DELAY_SECONDS
            except grpc.aio.AioRpcError as error:
                if error.code() in _ENDS:
                    raise Dismissed(error.details()) from None
                if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                    self._tokens.forget()  # identity says whether the secret is still good
                log.warning("the training service is not reached", code=error.code().name, details=error.details())
                if error.code() == grpc.StatusCode.INTERNAL:
                    self._repeat(error)
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            delay = min(2 * delay, MAX_DELAY_SECONDS)

    async def welcome(self) -> pb.TrainerWelcome:
        """What is to be trained."""
        return await asyncio.shield(self._welcome)

    def tell(self, **event: Any) -> None:
        """Tells an event, now or when the stream is there again; nothing more once the stream has failed."""
        if self._has_failed:
            return
        self._num_told += 1
        told = pb.TrainerEvent(sequence=self._num_told, **event)
        self._unkept.append(told)
        self._all_kept.clear()
        self._send(pb.TrainRequest(event=told))

    async def all_kept(self) -> None:
        """Waits until the service has kept everything that was told."""
        await self._all_kept.wait()

    async def urls(self, kind: pb.UrlKind, names: list[str]) -> list[str]:
        """Fresh URLs, in the order of the names."""
        while True:
            self._num_wants += 1
            number = self._num_wants
            want = pb.UrlsWanted(request_id=number, kind=kind, names=names)
            answer: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
            self._wants[number] = (want, answer)
            self._send(pb.TrainRequest(want=want))
            try:
                async with asyncio.timeout(_URL_SECONDS):
                    return await answer
            except TimeoutError:
                continue  # the stream may be down
            finally:
                del self._wants[number]

    def _repeat(self, error: grpc.aio.AioRpcError) -> None:
        """Counts how often the service failed since it last took something. When it will never take what it is told,
        the training fails of that: this is told instead, and nothing else."""
        self._num_repeats += 1
        if self._num_repeats <= _MAX_REPEATS:
            return
        if self._has_failed:
            raise error
        self._num_repeats = 0
        self._unkept.clear()
        self.tell(failed=pb.TrainerFailed(reason=f"the training service cannot go on: {error.details()}"))
        self._has_failed = True
        self._on_stop()

    async def _converse(self) -> None:
        """One stream, from hello to its end."""
        try:
            token = await self._tokens.token()
        except grpc.aio.AioRpcError as error:
            if error.code() in _REFUSALS:
                raise Dismissed(f"this trainer's secret is not known any more: {error.details()}") from None
            raise
        call = self._stub.Train(metadata=((TOKEN_METADATA, token),))
        outbox: asyncio.Queue[pb.TrainRequest] = asyncio.Queue()
        outbox.put_nowait(pb.TrainRequest(hello=self._hello))
        reader = asyncio.create_task(self._read(call, outbox))
        writer = asyncio.create_task(self._write(call, outbox))
        try:
            await asyncio.wait([reader, writer], return_when=asyncio.FIRST_COMPLETED)
            await reader  # what breaks a write breaks the read too, and that one knows why
        finally:
            self._outbox = None
            call.cancel()
            for task in (reader, writer):
                task.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)

    async def _read(self, call: Any, outbox: asyncio.Queue[pb.TrainRequest]) -> None:
        message: Any
        while (message := await call.read()) is not grpc.aio.EOF:
            self._receive(message, outbox)
        code = await call.code()
        if code != grpc.StatusCode.OK:
            raise grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details=await call.details())

    async def _write(self, call: Any, outbox: asyncio.Queue[pb.TrainRequest]) -> None:
        while True:
            await call.write(await outbox.get())

    def _receive(self, message: pb.TrainResponse, outbox: asyncio.Queue[pb.TrainRequest]) -> None:
        match message.WhichOneof("message"):
            case "welcome":
                self._begin(message.welcome, outbox)
            case "kept":
                self._num_repeats = 0
                self._forget(message.kept.sequence)
            case "urls":
                self._num_repeats = 0
                _, answer = self._wants.get(message.urls.request_id, (None, None))
                if answer is not None and not answer.done():
                    answer.set_result(list(message.urls.urls))
            case "stop" if message.stop.goes_on_elsewhere:
                raise Superseded("another trainer has taken over this training")
            case "stop":
                log.info("asked to stop")
                self._on_stop()

    def _begin(self, welcome: pb.TrainerWelcome, outbox: asyncio.Queue[pb.TrainRequest]) -> None:
        """The stream is up: tells what is not kept yet, and asks again for what was not answered."""
        log.info("connected to the training service", num_kept=welcome.num_kept)
        self._outbox = outbox
        self._forget(welcome.num_kept)
        for event in self._unkept:
            self._send(pb.TrainRequest(event=event))
        for want, _ in self._wants.values():
            self._send(pb.TrainRequest(want=want))
        if not self._welcome.done():
            self._welcome.set_result(welcome)

    def _forget(self, sequence: int) -> None:
        while self._unkept and self._unkept[0].sequence <= sequence:
            self._unkept.popleft()
        if not self._unkept:
            self._all_kept.set()

    def _send(self, message: pb.TrainRequest) -> None:
        if self._outbox is not None:
            self._outbox.put_nowait(message)
