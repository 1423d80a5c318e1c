"""Objects that nobody may see any more, remembered until the last URL that writes them is over. One method is one
transaction.

Whoever had a URL may still upload: so each prefix is emptied twice, at once and when no URL for it is valid any more.
A process that dies in between forgets nothing.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import structlog
from sqlalchemy import ARRAY, DateTime, Integer, Interval, Table, Text, bindparam, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import Field, SQLModel

from services.common.blobs import Blobs
from services.common.database import Database
from services.common.driver import Run
from services.common.errors import Unavailable

log = structlog.get_logger()

WRITABLE_SECONDS = 24 * 3600  # so long the URLs live by which workers write; clients' end sooner
_AT_ONCE = 100
_EXPECTED_SECONDS = 3600.0  # longer than any request takes
_TIME = DateTime(timezone=True)


class Leftover(SQLModel, table=True):
    """Objects that nobody may see any more. They are removed at `due_time`, and for good at `final_time`."""

    prefix: str = Field(primary_key=True)
    due_time: datetime = Field(sa_type=_TIME)
    final_time: datetime = Field(sa_type=_TIME)


_LEFTOVER: Table = Leftover.__table__  # type: ignore[attr-defined]
_LEAVE = insert(_LEFTOVER).from_select(
    ["prefix", "due_time", "final_time"],
    select(
        func.unnest(bindparam("prefixes", type_=ARRAY(Text))),
        func.now() + bindparam("after", type_=Interval),
        func.now() + timedelta(seconds=WRITABLE_SECONDS),
    ),
)
_LEAVE = _LEAVE.on_conflict_do_update(
    index_elements=["prefix"],
    set_={"due_time": _LEAVE.excluded.due_time, "final_time": _LEAVE.excluded.final_time},
)
_DUE = (
    select(_LEFTOVER)
    .where(_LEFTOVER.c.due_time <= func.now())
    .order_by(_LEFTOVER.c.due_time)
    .limit(bindparam("number", type_=Integer))
)
_THIS = (_LEFTOVER.c.prefix == bindparam("this")) & (_LEFTOVER.c.due_time == bindparam("due", type_=_TIME))
_FORGET = delete(_LEFTOVER).where(_THIS, _LEFTOVER.c.final_time <= bindparam("due", type_=_TIME))
_AGAIN_AT_ITS_END = update(_LEFTOVER).where(_THIS).values(due_time=_LEFTOVER.c.final_time)
_WITHDRAW = delete(_LEFTOVER).where(_LEFTOVER.c.prefix == func.any(bindparam("prefixes", type_=ARRAY(Text))))


async def note_leftovers(transaction: AsyncSession | Run, prefixes: list[str], after_seconds: float = 0.0) -> None:
    """Notes, within a store's transaction, that what is below the prefixes is to be removed, then and at the end."""
    values: dict[str, Any] = {"prefixes": prefixes, "after": timedelta(seconds=after_seconds)}
    if isinstance(transaction, AsyncSession):
        await transaction.execute(_LEAVE, values)
    else:
        await transaction(_LEAVE, **values)


async def withdraw_leftovers(run: Run, prefixes: list[str]) -> None:
    """Keeps what is below prefixes that were noted in case that this transaction does not come."""
    await run(_WITHDRAW, prefixes=prefixes)


class LeftoverStore:
    """The prefixes to be emptied."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, prefixes: list[str], after_seconds: float = 0.0) -> None:
        """Notes that what is below the prefixes is to be removed, then and at the end."""
        await note_leftovers(self._database.run, prefixes, after_seconds)

    async def due(self, limit: int) -> list[Leftover]:
        """What is to be removed now."""
        return [Leftover(**row) for row in await self._database.run(_DUE, number=limit)]

    async def swept(self, prefix: str, due_time: datetime) -> None:
        """The prefix is empty: it comes up again at its end, and after that never. What was noted since stays due."""
        async with self._database.atomic() as run:
            await run(_FORGET, this=prefix, due=due_time)
            await run(_AGAIN_AT_ITS_END, this=prefix, due=due_time)


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

    async def expect(self, prefixes: list[str]) -> None:
        """Notes prefixes below which objects come before what they are for: should that never come, they go. Its
        transaction has `withdraw_leftovers`."""
        await self._store.add(prefixes, _EXPECTED_SECONDS)

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
