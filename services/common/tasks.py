"""Owns what asyncio lacks for tasks that run beside each other and wait for events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import structlog

from services.common.errors import EsdError

log = structlog.get_logger()

_CANCEL_AGAIN_SECONDS = 1.0


async def heard(event: asyncio.Event, seconds: float) -> bool:
    """Waits for the event and clears it. False: it did not come in time."""
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False
    finally:
        event.clear()


async def first(*works: Coroutine[Any, Any, Any]) -> None:
    """Runs all until one ends, then ends the others; raises what it raised."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await cancel(tasks)
        await asyncio.gather(*tasks, return_exceptions=True)  # else what the others raised says so at its end
    for task in done:
        task.result()


async def cancel(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancels tasks and returns when all have ended, also if it is cancelled itself meanwhile.

    It is repeated, for a library may swallow a cancellation that comes at a bad moment: psycopg's pool does while it
    connects. A TaskGroup cancels its tasks once.
    """
    is_cancelled = False
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        try:
            await asyncio.wait(pending, timeout=_CANCEL_AGAIN_SECONDS)
        except asyncio.CancelledError:
            is_cancelled = True
    if is_cancelled:
        raise asyncio.CancelledError


@asynccontextmanager
async def together() -> AsyncIterator[asyncio.TaskGroup]:
    """A group of tasks that raises what the first of them to fail raised, as such."""
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


class Background:
    """Work that nobody waits for: its failure concerns nobody but the log."""

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
        task.add_done_callback(lambda _: work.close())  # else what was stopped before it began says so at its end

    async def stop(self) -> None:
        """Ends all chores."""
        await cancel(self._tasks)
