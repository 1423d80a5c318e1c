"""Objects that nobody may see any more, remembered until the last URL that writes them is over. One method is one
transaction.

A deleted job's client, or a worker that lost its lease, may still upload: so each prefix is emptied twice, at once and
when no URL for it is valid any more. A process that dies in between forgets nothing.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from services.common.database import Database
from services.inference.rows import WRITABLE_SECONDS, Leftover


async def leave_behind(session: AsyncSession, prefixes: list[str], after_seconds: float = 0.0) -> None:
    """Notes, within a store's transaction, that what is below the prefixes is to be removed, then and at the end."""
    due, final = (func.now() + timedelta(seconds=seconds) for seconds in (after_seconds, WRITABLE_SECONDS))
    times = {"due_time": due, "final_time": final}
    for prefix in prefixes:
        row = insert(Leftover).values(prefix=prefix, **times)
        await session.execute(row.on_conflict_do_update(index_elements=["prefix"], set_=times))


class LeftoverStore:
    """The prefixes to be emptied."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, prefixes: list[str]) -> None:
        """Notes that what is below the prefixes is to be removed."""
        async with self._database.transaction() as session:
            await leave_behind(session, prefixes)

    async def due(self, limit: int) -> list[Leftover]:
        """What is to be removed now."""
        query = select(Leftover).where(col(Leftover.due_time) <= func.now()).order_by(col(Leftover.due_time))
        async with self._database.transaction() as session:
            return list(await session.scalars(query.limit(limit)))

    async def swept(self, prefix: str, due_time: datetime) -> None:
        """The prefix is empty: it comes up again at its end, and after that never. What was noted since stays due."""
        this = (col(Leftover.prefix) == prefix) & (col(Leftover.due_time) == due_time)
        async with self._database.transaction() as session:
            await session.execute(delete(Leftover).where(this, col(Leftover.final_time) <= due_time))
            await session.execute(update(Leftover).where(this).values(due_time=col(Leftover.final_time)))
