"""Fans the database's notifications out to the tasks of this process that wait for one key of a channel.

`jobs_queued`: an endpoint's id, there is something to claim. `job_ended`: a job's id. `leases_lost`: a worker's id,
some of its jobs were taken back. `deadline_set`: a job's id, it must end in time. `pools_changed`: a worker came or
went; everyone who watches pools hears it. `jobs_watched` and `jobs_moved` belong to watching/board.py: ids of jobs that
somebody looks at, or that got further. `webhooks_due`: a job's id, whose webhook is to be called.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

JOBS_QUEUED = "jobs_queued"
JOB_ENDED = "job_ended"
LEASES_LOST = "leases_lost"
POOLS_CHANGED = "pools_changed"
JOBS_WATCHED = "jobs_watched"
JOBS_MOVED = "jobs_moved"
DEADLINE_SET = "deadline_set"
WEBHOOKS_DUE = "webhooks_due"
CHANNELS = [JOBS_QUEUED, JOB_ENDED, LEASES_LOST, POOLS_CHANGED, JOBS_WATCHED, JOBS_MOVED, DEADLINE_SET, WEBHOOKS_DUE]


class Signals:
    """Events by channel and key. An empty key waits for every notification of its channel."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[str, str], set[asyncio.Event]] = defaultdict(set)
        self._listeners: dict[str, list[Callable[[str], None]]] = defaultdict(list)
        self.connected_at = asyncio.get_running_loop().time()

    def listen(self, channel: str, hear: Callable[[str], None]) -> None:
        """Has every payload of a channel told; an empty one when some may have been missed."""
        self._listeners[channel].append(hear)

    @contextmanager
    def subscribed(self, *keys: tuple[str, str]) -> Iterator[asyncio.Event]:
        """An event that is set whenever one of the (channel, key) is notified; who waits for it clears it."""
        event = asyncio.Event()
        for key in keys:
            self._waiting[key].add(event)
        try:
            yield event
        finally:
            for key in keys:
                self._waiting[key].discard(event)
                if not self._waiting[key]:
                    del self._waiting[key]

    async def on_notify(self, channel: str, payload: str) -> None:
        """Wakes those who wait for the key; everybody when the connection is new and something may have been missed."""
        if not payload:
            self.connected_at = asyncio.get_running_loop().time()
        for hear in self._listeners[channel]:
            hear(payload)
        for key, events in list(self._waiting.items()):
            if key[0] == channel and (not payload or key[1] in {payload, ""}):
                for event in events:
                    event.set()


async def heard(event: asyncio.Event, seconds: float) -> bool:
    """Waits for the event and clears it. False: it did not come in time."""
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False
    finally:
        event.clear()


async def wait(event: asyncio.Event, sweep_seconds: float) -> None:
    """Waits for the event and clears it. The sweep is a safety net, should a notification ever be lost."""
    await heard(event, sweep_seconds)
