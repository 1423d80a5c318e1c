"""TrainerService: the streams of trainers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from typing import Any
from uuid import UUID

import grpc
import structlog

from esd.training.v1 import training_pb2 as pb
from esd.training.v1 import training_pb2_grpc
from services.common import validation
from services.common.auth import current_caller
from services.common.errors import FailedPrecondition, InvalidArgument, PermissionDenied, Unavailable
from services.common.notifications import Notifications
from services.common.payloads.trainers import MAX_POINTS
from services.common.sentences import MAX_REASON, printable
from services.common.structs import struct
from services.common.tasks import first, heard
from services.training import facts, trainers
from services.training.channels import TRAINING_MOVED
from services.training.rows import PHASES, Training
from services.training.store import TrainingStore
from services.training.trainer_store import TakenOver
from services.training.trainers import Trainers, Welcome

log = structlog.get_logger()

_SWEEP_SECONDS = 5.0
_MAX_SEQUENCE = 2**63 - 1  # of PostgreSQL's numbers
_RECONNECT = "the service is stopping; connect again"
_KINDS = {
    pb.URL_KIND_BASE: trainers.BASE,
    pb.URL_KIND_PICTURE: trainers.PICTURE,
    pb.URL_KIND_REGULARISATION: trainers.REGULARISATION,
    pb.URL_KIND_STATE: trainers.STATE,
    pb.URL_KIND_UPLOAD: trainers.UPLOAD,
}


class TrainerServicer(training_pb2_grpc.TrainerServiceServicer):
    """Speaks to trainers. `stopping` ends the streams, so that they go elsewhere."""

    def __init__(
        self, domain: Trainers, store: TrainingStore, notifications: Notifications, stopping: asyncio.Event
    ) -> None:
        self._domain = domain
        self._store = store
        self._notifications = notifications
        self._stopping = stopping

    async def Train(
        self, request_iterator: AsyncIterator[pb.TrainRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.TrainResponse]:
        session = _TrainSession(self._domain, self._store, self._notifications, _training_of_token())
        work = asyncio.create_task(session.run(request_iterator, self._stopping))
        try:
            while (message := await session.outbox.get()) is not None:
                yield message
            await work
        finally:
            work.cancel()


class _TrainSession:
    """One Train stream: answers what the trainer asks, keeps what it tells, and says when it shall stop."""

    def __init__(self, domain: Trainers, store: TrainingStore, notifications: Notifications, training_id: UUID) -> None:
        self.outbox: asyncio.Queue[pb.TrainResponse | None] = asyncio.Queue()
        self._domain = domain
        self._store = store
        self._notifications = notifications
        self._training_id = training_id

    async def run(self, requests: AsyncIterator[pb.TrainRequest], stopping: asyncio.Event) -> None:
        """Serves the stream until either side ends it; None in the outbox is its end."""
        try:
            training, session = await self._welcome(requests)
            await first(self._read(training, session, requests), self._watch(session), stopping.wait())
            if stopping.is_set():
                raise Unavailable(_RECONNECT)
        except TakenOver:
            self._send(stop=pb.TrainerStop(goes_on_elsewhere=True))
            raise
        finally:
            self.outbox.put_nowait(None)

    async def _welcome(self, requests: AsyncIterator[pb.TrainRequest]) -> tuple[Training, UUID]:
        hello = await validation.hello(requests, "Train")
        session = UUID(hello.session)
        welcome = await self._domain.welcome(self._training_id, session)
        training = welcome.training
        self._send(welcome=_welcome(welcome))
        log.info("trainer came", training=str(training.id), session=hello.session, device=hello.device)
        return training, session

    async def _read(self, training: Training, session: UUID, requests: AsyncIterator[pb.TrainRequest]) -> None:
        async for request in requests:
            match request.WhichOneof("message"):
                case "want":
                    kind = _KINDS.get(request.want.kind)
                    if kind is None:
                        raise InvalidArgument("the kind of the wanted URLs is not known")
                    urls = self._domain.urls(training, session, kind, list(request.want.names))
                    self._send(urls=pb.UrlsGranted(request_id=request.want.request_id, urls=urls))
                case "event":
                    training = await self._keep(training, session, request.event)
                    if training.is_ended and not training.is_leaving:
                        return
                case other:
                    raise InvalidArgument(f"a Train stream does not go on with {other}")

    async def _keep(self, training: Training, session: UUID, event: pb.TrainerEvent) -> Training:
        if event.sequence > _MAX_SEQUENCE:
            raise InvalidArgument(f"the sequence of an event is {event.sequence}; at most {_MAX_SEQUENCE} is possible")
        fact = _fact(event)
        try:
            kept = await self._domain.record(training, session, event.sequence, fact)
        except FailedPrecondition as error:
            # What is not in the store as it was told will not be there when it is told again.
            log.warning("a trainer is not heard", training=str(training.id), reason=str(error))
            raise
        self._send(kept=pb.EventsKept(sequence=event.sequence))
        return kept

    async def _watch(self, session: UUID) -> None:
        """Tells the trainer to stop once its training has ended without it; another trainer's is none of its own."""
        has_said_so = False
        with self._notifications.subscribed((TRAINING_MOVED, str(self._training_id))) as moved:
            while True:
                training = await self._store.get(self._training_id)
                if training is not None and training.session not in {session, None}:
                    raise TakenOver(self._training_id)
                if (training is None or training.is_ended) and not has_said_so:
                    self._send(stop=pb.TrainerStop())
                    has_said_so = True
                await heard(moved, _SWEEP_SECONDS)

    def _send(self, **message: Any) -> None:
        self.outbox.put_nowait(pb.TrainResponse(**message))


def _training_of_token() -> UUID:
    name = current_caller().name
    try:
        return UUID(name)
    except ValueError:
        raise PermissionDenied(f"the token is for {name!r}, which is no training") from None


def _welcome(welcome: Welcome) -> pb.TrainerWelcome:
    training = welcome.training
    base = training.base
    message = pb.TrainerWelcome(
        config=struct(training.config),
        fm_type=training.fm_type,
        base=pb.InputFile(name=base["name"], size_bytes=base["size_bytes"], sha256=base["sha256"]),
        base_cache_key=base["cache_key"],
        pictures=[pb.InputFile(name=name, size_bytes=size) for name, size in welcome.pictures],
        regularisation=[pb.InputFile(name=name, size_bytes=size) for name, size in welcome.regularisation],
        num_kept=training.num_kept,
    )
    if training.state is not None:
        state = training.state
        message.state.MergeFrom(pb.InputFile(name="state.pt", size_bytes=state["size_bytes"], sha256=state["sha256"]))
    return message


def _fact(event: pb.TrainerEvent) -> facts.Fact:
    """What an event tells.

    Raises:
        InvalidArgument: it tells nothing that is possible.
    """
    kind = event.WhichOneof("event")
    if kind not in _FACTS:
        raise InvalidArgument(f"a trainer's event {kind} is not known")
    return _FACTS[kind](getattr(event, kind))


def _phase(told: pb.TrainerPhase) -> facts.Fact:
    if told.status not in PHASES:
        raise InvalidArgument(f"a trainer's phase {told.status!r} is not known")
    return facts.Phase(told.status)


def _progress(told: pb.TrainerProgress) -> facts.Fact:
    if len(told.points) > MAX_POINTS:
        raise InvalidArgument(f"a progress has {len(told.points)} points; at most {MAX_POINTS} are possible")
    if not math.isfinite(told.seconds_left):
        raise InvalidArgument("the time that is left is no number")
    points = [_point(point) for point in told.points]
    return facts.Progress(points, told.num_steps, told.num_epochs, told.seconds_left)


def _point(point: pb.MetricPoint) -> facts.Point:
    rates = {_text(part): rate for part, rate in point.learning_rates.items()}
    if point.step < 1 or not all(map(math.isfinite, (point.loss, point.average_loss, *rates.values()))):
        raise InvalidArgument(f"step {point.step} has a loss or a learning rate that is no number, or does not exist")
    return facts.Point(point.step, point.epoch, point.loss, point.average_loss, rates)


def _text(told: str) -> str:
    """What can be kept of a text: PostgreSQL takes no NUL, and a training shall not end for one."""
    return told.replace("\0", "")


def _uploaded(file: pb.UploadedFile) -> facts.Uploaded:
    return facts.Uploaded(file.name, file.size_bytes, file.sha256)


_FACTS: dict[str, Callable[[Any], facts.Fact]] = {
    "phase": _phase,
    "progress": _progress,
    "log": lambda told: facts.Log(_text(told.line)),
    "saved": lambda told: facts.Saved(_uploaded(told.file), told.epoch),
    "preview": lambda told: facts.Preview(_uploaded(told.file), told.epoch, _text(told.prompt)),
    "removed": lambda told: facts.Removed(told.name),
    "board": lambda told: facts.Board(_uploaded(told)),
    "state": lambda told: facts.Kept(_uploaded(told.file), told.epoch),
    "done": lambda _: facts.Done(),
    "failed": lambda told: facts.Failed(printable(_text(told.reason), MAX_REASON) or "the trainer failed"),
}
