"""Work that nobody waits for: its failure concerns nobody but the log."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import structlog

from services.common.errors import EsdError

log = structlog.get_logger()


class Background:
    """The chores under way."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def run(self, work: Coroutine[Any, Any, Any]) -> None:
        """Begins a chore."""

        async def quietly() -> None:
            try:
                await work
            except EsdError as error:
                log.warning("chore failed", reason=str(error))

        task = asyncio.create_task(quietly())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """Ends all chores."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
