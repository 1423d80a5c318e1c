"""What a watcher of a training is told: what was noted of it, how it stands, then each change, until it has ended.

Trainings are few and long, so the database is where trainers and watchers meet: a trainer's progress is written once a
second at most, and a notification has every watcher of that training look again, on whichever replica.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

from services.common.errors import NotFound, Unavailable
from services.common.notifications import Notifications
from services.common.tasks import heard
from services.common.viewer import Viewer
from services.training.channels import TRAINING_MOVED
from services.training.domain import Trainings
from services.training.rows import Event, Training
from services.training.store import TrainingStore

_PING_SECONDS = 15.0
_CLOSED = "the service is stopping; ask again"


@dataclass(frozen=True)
class Status:
    """The training's status, and what it waits for."""

    status: str
    waits_for: str


@dataclass(frozen=True)
class Step:
    """How far it is."""

    progress: dict[str, Any]


@dataclass(frozen=True)
class Noted:
    """Something was noted; `url` is that of a picture."""

    event: Event
    url: str = ""


@dataclass(frozen=True)
class Ended:
    """Nothing more happens."""

    status: str
    reason: str


@dataclass(frozen=True)
class Ping:
    """Nothing has happened for a while."""


News = Status | Step | Noted | Ended | Ping


class Watching:
    """The events of trainings, for those who may see them. `stopping` sends every watcher away, whom
    `notifications` wake then."""

    def __init__(
        self, trainings: Trainings, store: TrainingStore, notifications: Notifications, stopping: asyncio.Event
    ) -> None:
        self._trainings = trainings
        self._store = store
        self._notifications = notifications
        self._stopping = stopping

    async def watch(self, job_id: str, user: Viewer) -> AsyncIterator[News]:
        """Everything that happens to the training.

        Raises:
            NotFound, PermissionDenied. Unavailable: the service stops.
        """
        training = await self._trainings.get_job(job_id, user)
        told = _Told()
        with self._notifications.subscribed((TRAINING_MOVED, str(training.id))) as moved:
            while True:
                if self._stopping.is_set():
                    raise Unavailable(_CLOSED)
                try:
                    training = await self._trainings.get_job(job_id, user)
                except NotFound:
                    yield Ended("Stopped", f"training {job_id} was deleted")
                    return
                while events := await self._store.events(training.id, told.last_event):
                    for event in events:
                        told.last_event = event.id or 0
                        yield self._noted(training, event)
                for news in told.news(training):
                    yield news
                if training.is_settled:
                    yield Ended(training.status, training.reason)
                    return
                if not await heard(moved, _PING_SECONDS):
                    yield Ping()

    def _noted(self, training: Training, event: Event) -> Noted:
        if event.kind != "preview":
            return Noted(event)
        return Noted(event, self._trainings.picture_url(training, event.data["name"]))


class _Told:
    """What a watcher has heard."""

    def __init__(self) -> None:
        self.last_event = 0
        self._status: Status | None = None
        self._step = 0

    def news(self, training: Training) -> Iterator[News]:
        """What it has not heard of the training's state."""
        status = Status(training.status, training.waits_for)
        if status != self._status:
            self._status = status
            yield status
        progress = training.progress
        if progress is not None and progress["step"] != self._step:
            self._step = progress["step"]
            yield Step(progress)
