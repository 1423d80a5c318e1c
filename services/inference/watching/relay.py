"""One Work stream at the hub: tells it the progress of the stream's jobs, and the worker who watches them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from uuid import UUID

from esd.worker.v1 import worker_pb2
from services.inference.watching.hub import Hub
from services.inference.watching.store import Progress


class Relay:
    """Belongs to a stream. `say_watched(lease_id, is_watched)` tells the worker."""

    def __init__(self, hub: Hub, say_watched: Callable[[UUID, bool], None]) -> None:
        self._hub = hub
        self._say_watched = say_watched
        self._progress: dict[UUID, tuple[UUID, Progress]] = {}  # from a lease to its job

    async def keep(self, leases: Iterable[UUID]) -> None:
        """The worker came back with these leases."""
        for lease_id, job_id in (await self._hub.jobs_of(leases)).items():
            self.take(lease_id, job_id)

    def take(self, lease_id: UUID, job_id: UUID) -> None:
        """The worker holds a job."""
        self._progress[lease_id] = (job_id, Progress(lease_id))
        self._hub.hold(job_id, lease_id, partial(self._say_watched, lease_id))

    def tell(self, lease_id: UUID, event: worker_pb2.JobEvent) -> None:
        """The worker said how far a job is; of a lease that it has lost, nothing is shown."""
        if lease_id not in self._progress:
            return
        job_id, before = self._progress[lease_id]
        match event.WhichOneof("event"):
            case "started":
                progress = replace(before, has_started=True)
            case "progress":
                step, num_steps = event.progress.step, event.progress.num_steps
                progress = replace(before, has_started=True, step=step, num_steps=num_steps)
            case "preview":
                number = before.num_previews + 1
                progress = replace(before, has_started=True, preview=event.preview.jpeg, num_previews=number)
            case _:
                return
        self._progress[lease_id] = (job_id, progress)
        self._hub.report(job_id, progress)

    def drop(self, lease_id: UUID) -> None:
        """The worker holds a job no more."""
        job_id, _ = self._progress.pop(lease_id, (None, None))
        if job_id is not None:
            self._hub.release(job_id, lease_id)

    def close(self) -> None:
        """The stream is over."""
        for lease_id in list(self._progress):
            self.drop(lease_id)
