"""Fans the database's notifications out to the tasks of this process that wait for one key of a channel, and what such
tasks wait with."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any


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

    async def wake_all(self, at: asyncio.Event) -> None:
        """Once `at` is set, has everybody who waits look again."""
        await at.wait()
        for events in list(self._waiting.values()):
            for event in events:
                event.set()

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


async def first(*works: Coroutine[Any, Any, Any]) -> None:
    """Runs all until one ends, then ends the others; raises what it raised."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()
