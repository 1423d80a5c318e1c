"""Owns the end of tasks: cancelled until they have ended."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

_REPEAT_SECONDS = 1.0


async def cancel(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancels tasks and returns when all have ended. It is repeated, for a library may swallow a cancellation that
    comes at a bad moment: psycopg's pool does while it connects."""
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=_REPEAT_SECONDS)
