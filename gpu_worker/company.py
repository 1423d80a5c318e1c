"""Who is in the engine beside others, and who has it alone: a job that does not fit the memory in company may fit by
itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class Company:
    """The jobs in the engine. While one is to be alone nobody else comes in; `on_change` is called when that begins and
    ends."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._size = 0
        self._num_joined = 0
        self._on_change = on_change
        self._num_loners = 0
        self._turn = asyncio.Lock()  # of those who are to be alone
        self._changed = asyncio.Event()

    @property
    def is_closed(self) -> bool:
        """Whether somebody is to be alone, or is."""
        return self._num_loners > 0

    @asynccontextmanager
    async def joined(self) -> AsyncIterator[Callable[[], bool]]:
        """In the engine beside others. What it yields tells whether there has been another one, also if it has left."""
        while self.is_closed:
            await self._changed.wait()
        self._size += 1
        self._num_joined += 1
        is_first, number = self._size == 1, self._num_joined
        try:
            yield lambda: not is_first or self._num_joined > number
        finally:
            self._size -= 1
            self._wake()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """In the engine once all others have left it."""
        self._num_loners += 1
        self._on_change()
        try:
            async with self._turn:
                while self._size:
                    await self._changed.wait()
                yield
        finally:
            self._num_loners -= 1
            self._wake()
            self._on_change()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
