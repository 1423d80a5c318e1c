"""Owns the end of tasks: cancelled until they have ended."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

_REPEAT_SECONDS = 1.0


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
            await asyncio.wait(pending, timeout=_REPEAT_SECONDS)
        except asyncio.CancelledError:
            is_cancelled = True
    if is_cancelled:
        raise asyncio.CancelledError
