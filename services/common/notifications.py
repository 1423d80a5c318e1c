"""Fans the database's notifications out to the tasks of this process that wait for one key of a channel."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Notifications:
    """Events by channel and key. An empty key waits for every notification of its channel."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[str, str], set[asyncio.Event]] = defaultdict(set)
        self._listeners: dict[str, list[Callable[[str], None]]] = defaultdict(list)

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
        for hear in self._listeners[channel]:
            hear(payload)
        for key, events in list(self._waiting.items()):
            if key[0] == channel and (not payload or key[1] in {payload, ""}):
                for event in events:
                    event.set()
