"""Remembers what was done with each endpoint and why, written with the change itself, and kept bounded."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple
from uuid import UUID, uuid4

from sqlalchemy import delete, insert, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from services.common.database import Database
from services.endpoints.rows import Event

MAX_EVENTS = 200  # of an endpoint; older ones are removed


class Happening(NamedTuple):
    """What is to be remembered: a word of rows.py, and a sentence."""

    type: str
    message: str


class EventStore:
    """Reads events. They are written by `remember`, in the transaction of what they tell."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def page_events(self, endpoint_id: str, limit: int, after: tuple[datetime, UUID] | None) -> list[Event]:
        """The newest so many, or those that come after an event in this order."""
        place = tuple_(col(Event.time), col(Event.id))
        found = select(Event).where(col(Event.endpoint_id) == endpoint_id)
        if after is not None:
            found = found.where(place < after)
        newest_first = found.order_by(col(Event.time).desc(), col(Event.id).desc()).limit(limit)
        async with self._database.transaction() as session:
            return list((await session.execute(newest_first)).scalars())


async def remember(session: AsyncSession, endpoint_id: str, happening: Happening) -> None:
    """Writes an event, and removes the oldest where there are too many."""
    row = {"id": uuid4(), "endpoint_id": endpoint_id, "type": happening.type, "message": happening.message}
    await session.execute(insert(Event).values(row))
    time, here = col(Event.time), col(Event.endpoint_id) == endpoint_id
    oldest_kept = select(time).where(here).order_by(time.desc()).offset(MAX_EVENTS - 1).limit(1).scalar_subquery()
    too_old = delete(Event).where(here, time < oldest_kept)  # nothing, where there are fewer
    await session.execute(too_old.execution_options(synchronize_session=False))
