"""Brings the progress of jobs from those who hold them to those who watch them, on whichever replica each of them is.

On one replica both meet in memory. Between replicas go only the jobs that somebody watches elsewhere: a replica
announces which jobs are watched on it; the one whose worker holds such a job writes its latest state, and the others
read it. All of that is bundled, so its cost does not grow with the number of events, and nobody waits for it. How jobs
stand in the queue is read for all watched jobs at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from uuid import UUID, uuid4

import structlog

from services.common.errors import Unavailable
from services.common.notifications import Notifications
from services.common.tasks import heard
from services.inference.channels import JOB_ENDED, JOBS_MOVED, JOBS_QUEUED, JOBS_WATCHED
from services.inference.watching.store import Progress, Snapshot, WatchStore

log = structlog.get_logger()

_BUNDLE_SECONDS = 0.1  # what happens within goes together
_LOOK_SECONDS = 2.0
_ANNOUNCE_SECONDS = 10.0
_FORGET_SECONDS = 30.0  # after the last announcement
_SWEEP_SECONDS = 3600.0
_CLOSED = "the service is stopping; ask again"


@dataclass(eq=False)
class WatchedJob:
    """What is known here of a job that somebody watches. `snapshot` is None until it was read."""

    snapshot: Snapshot | None = None
    progress: Progress | None = None
    is_ended: bool = False
    watchers: set[asyncio.Event] = field(default_factory=set)
    num_shown: int = 0

    def show(self, progress: Progress) -> None:
        """The holder of the job has told something."""
        self.progress = progress
        self.num_shown += 1
        self.wake()

    def update(self, snapshot: Snapshot | None) -> None:
        """The database has told something; None: there is no such job any more."""
        self.snapshot = snapshot
        self.is_ended = snapshot is None or snapshot.is_ended
        if snapshot is None or (self.progress is not None and self.progress.lease_id != snapshot.lease_id):
            self.progress = None
        self.wake()

    def end(self) -> None:
        """The job has ended."""
        self.is_ended = True
        self.num_shown += 1
        self.wake()

    def wake(self) -> None:
        """Has every watcher look again; one that is still busy with the last look will not miss it."""
        for watcher in self.watchers:
            watcher.set()


@dataclass(eq=False)
class _Held:
    """A job that a worker of this replica holds. `on_watched` hears whether anybody looks."""

    progress: Progress
    on_watched: Callable[[bool], None]
    is_watched: bool = False


class Hub:
    """The watched and the held jobs of this replica. `run` must be running."""

    def __init__(self, store: WatchStore, notifications: Notifications) -> None:
        self._store = store
        self._replica = str(uuid4())
        self._watched_here: dict[UUID, WatchedJob] = {}
        self._held: dict[UUID, _Held] = {}
        self._watched_elsewhere: dict[UUID, float] = {}  # until when
        self._to_announce: set[UUID] = set()
        self._to_publish: set[UUID] = set()
        self._to_fetch: set[UUID] = set()
        self._to_look_at: set[UUID] = set()
        self._stir = asyncio.Event()
        self._clock = asyncio.get_running_loop().time
        self._is_closed = False
        notifications.listen(JOBS_WATCHED, self._hear_watched)
        notifications.listen(JOBS_MOVED, self._hear_moved)
        notifications.listen(JOBS_QUEUED, self._hear_queued)
        notifications.listen(JOB_ENDED, self._hear_ended)

    # --- those who watch ---

    @contextmanager
    def watch(self, job_id: UUID) -> Iterator[tuple[WatchedJob, asyncio.Event]]:
        """What is known of a job, and an event that is set when that has changed; who waits for it clears it."""
        if job_id not in self._watched_here:
            self._watched_here[job_id] = WatchedJob()
            self._consider(job_id)
            self._to_announce.add(job_id)
        watched, changed = self._watched_here[job_id], asyncio.Event()
        watched.watchers.add(changed)
        self._to_look_at.add(job_id)
        self._stir.set()
        try:
            yield watched, changed
        finally:
            watched.watchers.discard(changed)
            if not watched.watchers:
                del self._watched_here[job_id]
                self._consider(job_id)

    def check_open(self) -> None:
        """Raises:
        Unavailable: the service is stopping.
        """
        if self._is_closed:
            raise Unavailable(_CLOSED)

    # --- those who hold ---

    async def jobs_of(self, leases: Iterable[UUID]) -> dict[UUID, UUID]:
        """From each lease to its job."""
        return await self._store.jobs_of(list(leases))

    def hold(self, job_id: UUID, lease_id: UUID, on_watched: Callable[[bool], None]) -> None:
        """A worker of this replica has the job; `on_watched` hears at once and later whether anybody looks."""
        self._held[job_id] = _Held(Progress(lease_id), on_watched)
        self._consider(job_id)

    def report(self, job_id: UUID, progress: Progress) -> None:
        """The job has got further; told under any lease but the one that it is held under, it is ignored."""
        held = self._held.get(job_id)
        if held is None or held.progress.lease_id != progress.lease_id:
            return
        held.progress = progress
        if job_id in self._watched_here:
            self._watched_here[job_id].show(progress)
        if job_id in self._watched_elsewhere:
            self._to_publish.add(job_id)
            self._stir.set()

    def release(self, job_id: UUID, lease_id: UUID) -> None:
        """The worker has the job no more."""
        held = self._held.get(job_id)
        if held is not None and held.progress.lease_id == lease_id:
            del self._held[job_id]

    def _consider(self, job_id: UUID) -> None:
        """Tells the holder of a job when somebody begins or nobody goes on to look at it, and shows how far it is."""
        held = self._held.get(job_id)
        if held is None:
            return
        is_watched = job_id in self._watched_here or job_id in self._watched_elsewhere
        if is_watched != held.is_watched:
            held.is_watched = is_watched
            held.on_watched(is_watched)
        if held.progress.has_started:
            self.report(job_id, held.progress)

    # --- what other replicas and the store tell ---

    def _hear_watched(self, payload: str) -> None:
        replica, job_ids = _parse(payload)
        if replica not in {"", self._replica}:
            for job_id in job_ids:
                is_new = job_id not in self._watched_elsewhere
                self._watched_elsewhere[job_id] = self._clock() + _FORGET_SECONDS
                if is_new or job_id in self._held:
                    self._consider(job_id)

    def _hear_moved(self, payload: str) -> None:
        replica, job_ids = _parse(payload)
        if replica != self._replica and (news := self._watched_here.keys() & job_ids):
            self._to_fetch |= news
            self._stir.set()

    def _hear_queued(self, payload: str) -> None:
        for job_id, watched in self._watched_here.items():
            snapshot = watched.snapshot  # of those in the queue the next look is soon enough
            if snapshot and snapshot.status == "created" and payload in {"", str(snapshot.endpoint_id)}:
                self._to_look_at.add(job_id)
                self._stir.set()

    def _hear_ended(self, payload: str) -> None:
        if not payload:
            self._to_look_at |= self._watched_here.keys()
            self._to_announce |= self._watched_here.keys()
            self._stir.set()
        elif watched := self._watched_here.get(UUID(payload)):
            watched.end()

    # --- the loop ---

    async def run(self, stopping: asyncio.Event) -> None:
        """Carries news between the replicas until cancelled; once `stopping` is set, every watcher is sent away."""
        closing = asyncio.create_task(self._close(stopping))
        look_at = announce_at = sweep_at = self._clock()
        try:
            while True:
                await heard(self._stir, _LOOK_SECONDS)
                now = self._clock()
                if now >= look_at:
                    self._to_look_at |= self._watched_here.keys()
                    look_at = now + _LOOK_SECONDS
                if now >= announce_at:
                    self._to_announce |= self._watched_here.keys()
                    announce_at = now + _ANNOUNCE_SECONDS
                self._forget(now)
                try:
                    await self._carry()
                    if now >= sweep_at:
                        await self._store.sweep(_SWEEP_SECONDS)
                        sweep_at = now + _SWEEP_SECONDS
                except Unavailable as error:
                    log.warning("watchers wait", reason=str(error))
                await asyncio.sleep(_BUNDLE_SECONDS)
        finally:
            closing.cancel()

    async def _carry(self) -> None:
        """Announces what is watched, publishes what moved, fetches what moved elsewhere, looks at the queue."""
        announced, self._to_announce = self._to_announce & self._watched_here.keys(), set()
        published, self._to_publish = self._to_publish & self._held.keys(), set()
        fetched, self._to_fetch = self._to_fetch & self._watched_here.keys(), set()
        looked_at, self._to_look_at = self._to_look_at & self._watched_here.keys(), set()
        if announced:
            await self._store.announce(self._replica, announced)
        if published:
            await self._store.publish(
                self._replica, {job_id: held.progress for job_id in published if (held := self._held.get(job_id))}
            )
        if fetched:
            for job_id, progress in (await self._store.fetch(fetched)).items():
                if (watched := self._watched_here.get(job_id)) and job_id not in self._held:
                    watched.show(progress)
        if looked_at:
            before = {
                job_id: self._watched_here[job_id].num_shown for job_id in looked_at if job_id in self._watched_here
            }
            snapshots = await self._store.snapshots(looked_at)
            for job_id, num_shown in before.items():
                # What was shown during the query is newer than its answer.
                if (watched := self._watched_here.get(job_id)) and (
                    watched.num_shown == num_shown or watched.snapshot is None
                ):
                    watched.update(snapshots.get(job_id))

    def _forget(self, now: float) -> None:
        for job_id in [job_id for job_id, until in self._watched_elsewhere.items() if until <= now]:
            del self._watched_elsewhere[job_id]
            self._consider(job_id)

    async def _close(self, stopping: asyncio.Event) -> None:
        await stopping.wait()
        self._is_closed = True
        for watched in self._watched_here.values():
            watched.wake()


def _parse(payload: str) -> tuple[str, set[UUID]]:
    """The replica that a payload is from, and its jobs."""
    replica, _, job_ids = payload.partition(" ")
    return replica, {UUID(job_id) for job_id in job_ids.split()}
