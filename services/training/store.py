"""Trainings in PostgreSQL as their users see them. One method is one transaction.

What trainers tell of them is in trainer_store.py.
"""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import func, select, tuple_
from sqlmodel import col

from services.common.database import Database, notify
from services.common.errors import ResourceExhausted, Unavailable
from services.common.leftovers import note_leftovers
from services.training.channels import TRAINING_MOVED, TRAININGS_DUE
from services.training.rows import Event, Metric, Training

_MAX_EVENTS = 500  # that are read at once
_LOCK = 0x74726E73  # for advisory locks by owner: their trainings are counted one request at a time
_RETRY_SECONDS = 60  # of an owner with too many; nobody knows when one ends


class TrainingStore:
    """The trainings."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, training: Training, max_unfinished: int) -> None:
        """Adds a training that has not begun.

        Raises:
            ResourceExhausted: as many of its owner have not ended as may (0: any number).
        """
        unfinished = select(func.count()).where(col(Training.owner) == training.owner, col(Training.outcome).is_(None))
        async with self._database.transaction() as session:
            await session.execute(select(func.pg_advisory_xact_lock(_LOCK, func.hashtext(training.owner))))
            if 0 < max_unfinished <= (number := (await session.execute(unfinished)).scalar_one()):
                raise ResourceExhausted(
                    f"{number} trainings of {training.owner} have not ended; at most {max_unfinished} are possible",
                    retry_after_seconds=_RETRY_SECONDS,
                )
            session.add(training)

    async def begin(self, training_id: UUID) -> None:
        """The training has begun.

        Raises:
            Unavailable: that took so long that it was removed.
        """
        async with self._database.transaction() as session:
            training = await session.get(Training, training_id, with_for_update=True)
            if training is None:
                raise Unavailable("the training took too long to begin; try again")
            training.is_begun = True
            await notify(session, TRAININGS_DUE, str(training_id))

    async def withdraw(self, training_id: UUID) -> None:
        """The training has not begun after all: nobody sees it any more."""
        async with self._database.transaction() as session:
            training = await session.get(Training, training_id, with_for_update=True)
            if training is not None:
                training.is_begun = False

    async def get(self, training_id: UUID) -> Training | None:
        """The training, if there is one that has begun."""
        async with self._database.transaction() as session:
            training = await session.get(Training, training_id)
            return training if training is not None and training.is_begun else None

    async def page(self, owner: str | None, limit: int, after: tuple[datetime, UUID] | None) -> list[Training]:
        """Trainings of an owner or (None) of all, newest first, after the position of another."""
        query = select(Training).where(col(Training.is_begun))
        if owner is not None:
            query = query.where(col(Training.owner) == owner)
        if after is not None:
            query = query.where(tuple_(col(Training.create_time), col(Training.id)) < after)
        query = query.order_by(col(Training.create_time).desc(), col(Training.id).desc()).limit(limit)
        async with self._database.transaction() as session:
            return list(await session.scalars(query))

    async def end(self, training_id: UUID, outcome: str, reason: str) -> None:
        """Ends a training that has not ended, if it is still there."""
        async with self._database.transaction() as session:
            training = await session.get(Training, training_id, with_for_update=True)
            if training is not None and not training.is_ended:
                training.end(outcome, reason)
                await notify(session, TRAINING_MOVED, str(training_id))
                await notify(session, TRAININGS_DUE, str(training_id))

    async def delete(self, training_id: UUID, prefixes: list[str]) -> None:
        """Deletes a training, if it is still there; the prefixes are left to the sweeper."""
        async with self._database.transaction() as session:
            training = await session.get(Training, training_id, with_for_update=True)
            if training is not None:
                await note_leftovers(session, prefixes)
                await session.delete(training)
                await notify(session, TRAINING_MOVED, str(training_id))

    async def events(self, training_id: UUID, after: int) -> list[Event]:
        """What was noted of a training after an event, in order; a part of it, where it is much."""
        query = select(Event).where(col(Event.training_id) == training_id, col(Event.id) > after)
        async with self._database.transaction() as session:
            return list(await session.scalars(query.order_by(col(Event.id)).limit(_MAX_EVENTS)))

    async def curve(self, training_id: UUID, max_points: int) -> tuple[list[Metric], int]:
        """At most so many steps, evenly chosen, the last one among them, and how many there are."""
        this = col(Metric.training_id) == training_id
        async with self._database.transaction() as session:
            num_steps = await session.scalar(select(func.count()).select_from(Metric).where(this)) or 0
            every = -(-num_steps // max_points) or 1
            last = select(func.max(col(Metric.step))).where(this).scalar_subquery()
            chosen = ((last - col(Metric.step)) % every) == 0
            found = await session.scalars(select(Metric).where(this, chosen).order_by(col(Metric.step)))
            return list(found), num_steps
