"""What a watcher of a job is told: each change of what the hub knows, until the job has ended.

A watcher that is slow is told the difference between what it heard last and what is now; what lay between is gone.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import datetime

from services.common.errors import NotFound
from services.common.tasks import heard
from services.common.viewer import Viewer
from services.inference.domain import Inference
from services.inference.rows import Job
from services.inference.views import Views
from services.inference.watching.hub import Hub, WatchedJob

_PING_SECONDS = 15.0
_ESTIMATE_SECONDS = 5.0  # an estimate that moves by less is not told again


@dataclass(frozen=True)
class Created:
    """The job waits for its start."""


@dataclass(frozen=True)
class Queued:
    """It waits for a worker. Position 0: a worker has it, and has not begun."""

    position: int
    estimated_start_time: datetime | None


@dataclass(frozen=True)
class Started:
    """A worker has begun."""


@dataclass(frozen=True)
class Step:
    """So many of the steps of all its images are done."""

    step: int
    num_steps: int


@dataclass(frozen=True)
class Preview:
    """What the picture looks like so far."""

    jpeg: bytes


@dataclass(frozen=True)
class Image:
    """A picture is ready."""

    index: int
    name: str
    url: str


@dataclass(frozen=True)
class Done:
    """The job has succeeded."""


@dataclass(frozen=True)
class Failed:
    """The job has failed."""

    reason: str


@dataclass(frozen=True)
class Ping:
    """Nothing has happened for a while."""


Event = Created | Queued | Started | Step | Preview | Image | Done | Failed | Ping


class Events:
    """The events of jobs, for those who may see the jobs."""

    def __init__(self, inference: Inference, views: Views, hub: Hub) -> None:
        self._inference = inference
        self._views = views
        self._hub = hub

    async def watch(self, job_id: str, user: Viewer) -> AsyncIterator[Event]:
        """How the job stands, then each change, until its end.

        Raises:
            NotFound, PermissionDenied. Unavailable: the service stops.
        """
        job = await self._inference.get_job(job_id, user)
        if not job.is_ended:  # once it has, the hub's word counts no more: its worker may still be on it
            told = _Told()
            with self._hub.watch(job.id) as (watched, changed):
                while not job.is_ended:
                    del job  # large, and a watcher may stay for long
                    while not watched.is_ended:
                        self._hub.check_open()
                        for event in told.news(watched):
                            yield event
                        if not watched.is_ended and not await heard(changed, _PING_SECONDS):
                            yield Ping()
                    try:
                        job = await self._inference.get_job(job_id, user)
                    except NotFound:
                        yield Failed(f"inference {job_id} was deleted")
                        return
                    if not job.is_ended:
                        watched.is_ended = False  # it was started again
        for event in self._end(job):
            yield event

    def _end(self, job: Job) -> Iterator[Event]:
        if job.failure is not None:
            yield Failed(job.failure)
            return
        urls, _ = self._views.result_urls(job)
        for index, (name, url) in enumerate(zip(job.image_names or [], urls, strict=True)):
            yield Image(index, name, url)
        yield Done()


class _Told:
    """What a watcher has heard."""

    def __init__(self) -> None:
        self._phase: Event | None = None
        self._step = 0
        self._num_previews = 0

    def news(self, watched: WatchedJob) -> Iterator[Event]:
        """What it has not heard."""
        phase = _phase(watched)
        if phase is not None and not _is_same(phase, self._phase):
            self._phase = phase
            self._step = self._num_previews = 0
            yield phase
        if not isinstance(phase, Started) or (progress := watched.progress) is None:
            return
        if progress.step not in {0, self._step}:
            self._step = progress.step
            yield Step(progress.step, progress.num_steps)
        if progress.num_previews not in {0, self._num_previews}:
            self._num_previews = progress.num_previews
            yield Preview(progress.preview)


def _phase(watched: WatchedJob) -> Created | Queued | Started | None:
    if watched.progress is not None and watched.progress.has_started:
        return Started()
    snapshot = watched.snapshot
    if snapshot is None or snapshot.is_ended:
        return None
    if snapshot.status == "created":
        return Created()
    if snapshot.is_running:
        return Started()
    return Queued(snapshot.position, snapshot.estimated_start_time)


def _is_same(phase: Event, told: Event | None) -> bool:
    if not isinstance(phase, Queued) or not isinstance(told, Queued) or phase.position != told.position:
        return phase == told
    old, new = told.estimated_start_time, phase.estimated_start_time
    if old is None or new is None:
        return old is new
    return abs((new - old).total_seconds()) < _ESTIMATE_SECONDS
