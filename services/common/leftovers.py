"""Objects that nobody may see any more, remembered until the last URL that writes them is over. One method is one
transaction.

Whoever had a URL may still upload: so each prefix is emptied twice, at once and
when no URL for it is valid any more. A process that dies in between forgets nothing.
"""

from __future__ import annotations

from datetime import datetime, timedelta

import structlog
from sqlalchemy import DateTime, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import Field, SQLModel, col

from services.common.blobs import Blobs
from services.common.database import Database
from services.common.errors import Unavailable

log = structlog.get_logger()

WRITABLE_SECONDS = 24 * 3600  # so long the URLs live by which workers write; clients' end sooner
_AT_ONCE = 100
_TIME = DateTime(timezone=True)


class Leftover(SQLModel, table=True):
    """Objects that nobody may see any more. They are removed at `due_time`, and for good at `final_time`."""

    prefix: str = Field(primary_key=True)
    due_time: datetime = Field(sa_type=_TIME)
    final_time: datetime = Field(sa_type=_TIME)


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


class Sweeper:
    """Empties the prefixes that stores have left behind. Two replicas may do so at once."""

    def __init__(self, store: LeftoverStore, blobs: Blobs) -> None:
        self._store = store
        self._blobs = blobs

    async def sweep(self) -> None:
        """Removes everything that is due.

        Raises:
            Unavailable: the store or the database does not answer; the rest stays due.
        """
        while found := await self._store.due(_AT_ONCE):
            for leftover in found:
                await self._blobs.delete_prefix(leftover.prefix)
                await self._store.swept(leftover.prefix, leftover.due_time)

    async def discard(self, prefixes: list[str]) -> None:
        """Notes prefixes of something that there is not, and removes what is below them."""
        await self._store.add(prefixes)
        await self.remove(prefixes)

    async def remove(self, prefixes: list[str]) -> None:
        """Removes what is below prefixes that are noted already; what cannot be removed now is at their next turn."""
        try:
            for prefix in prefixes:
                await self._blobs.delete_prefix(prefix)
        except Unavailable as error:
            log.warning("objects wait to be removed", prefixes=prefixes, reason=str(error))
