"""Trainings in PostgreSQL as their trainers and the control loop see them. One method is one transaction.

What a trainer tells counts only under the session that has the training now, and each event once.
"""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from services.common.database import Database, notify
from services.common.errors import FailedPrecondition
from services.common.leftovers import note_leftovers
from services.training import facts, rows
from services.training.channels import TRAINING_MOVED, TRAININGS_DUE
from services.training.rows import Event, Metric, Training

_MAX_LINES = 5000  # of a training's log that are kept
_MAX_LINE = 2000  # characters


class TakenOver(FailedPrecondition):
    """Another trainer has the training now, and goes on with it."""

    def __init__(self, training_id: UUID) -> None:
        super().__init__(f"another trainer has taken over training {training_id}")


class TrainerStore:
    """What trainers do with trainings."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def take(self, training_id: UUID, session_id: UUID) -> Training | None:
        """Gives the training to a session, unless it has ended; None: there is none.

        Raises:
            TakenOver: the session had it before. A trainer that was away does not take it from its successor.
        """
        async with self._database.transaction() as session:
            training = await session.get(Training, training_id, with_for_update=True)
            if training is not None and not training.is_ended:
                if training.was_left_by(session_id):
                    raise TakenOver(training_id)
                training.take(session_id)
                await notify(session, TRAINING_MOVED, str(training_id))
            return training

    async def hears(self, training_id: UUID, session_id: UUID) -> bool:
        """Whether a session may tell something now; not when the training has ended.

        Raises:
            TakenOver.
        """
        async with self._database.transaction() as session:
            return _hears(await session.get(Training, training_id), session_id)

    async def record(self, training_id: UUID, session_id: UUID, sequence: int, fact: facts.Fact) -> Training | None:
        """Keeps what a trainer told, once; None: the training has ended.

        Raises:
            TakenOver.
        """
        async with self._database.transaction() as session:
            training = await session.get(Training, training_id, with_for_update=True)
            if training is None or not _hears(training, session_id):
                return None
            if sequence > training.num_kept and training.is_ended and not training.is_leaving:
                return None
            if sequence > training.num_kept:
                training.num_kept = sequence
                if training.is_leaving:
                    await _keep_last(session, training, fact)
                else:
                    await _keep(session, training, fact)
                await notify(session, TRAINING_MOVED, str(training_id))
                if training.is_ended:
                    await notify(session, TRAININGS_DUE, str(training_id))
            return training

    # --- the control loop ---

    async def unsettled(self) -> list[Training]:
        """Trainings for which something is to be done, the oldest first."""
        query = select(Training).where(~col(Training.is_settled)).order_by(col(Training.create_time))
        async with self._database.transaction() as session:
            return list(await session.scalars(query))

    async def wait(self, training_id: UUID, waits_for: str) -> None:
        """Notes that the training's task was asked for, and what it waits for."""
        async with self._database.transaction() as session:
            training = await session.get(Training, training_id, with_for_update=True)
            if training is None or training.is_ended:
                return
            if training.status == rows.INITIAL:
                training.status = rows.STARTING
            elif training.waits_for == waits_for:
                return
            training.waits_for = waits_for
            await notify(session, TRAINING_MOVED, str(training_id))

    async def settle(self, training_id: UUID, outcome: str, reason: str) -> None:
        """Everything that follows the end of the training was done."""
        async with self._database.transaction() as session:
            training = await session.get(Training, training_id, with_for_update=True)
            if training is not None and not training.is_settled:
                training.settle(outcome, reason)
                await notify(session, TRAINING_MOVED, str(training_id))


def _hears(training: Training | None, session_id: UUID) -> bool:
    if training is None or (training.is_ended and training.session != session_id):
        return False
    if training.session != session_id:
        raise TakenOver(training.id)
    return True


async def _keep(session: AsyncSession, training: Training, fact: facts.Fact) -> None:
    match fact:
        case facts.Phase(status):
            training.status = status
        case facts.Progress():
            await _progress(session, training, fact)
        case facts.Log(line):
            await _note(session, training, "log", {"line": line[:_MAX_LINE]})
        case facts.Saved(file, epoch):
            training.save(file.name, file.sha256, file.size_bytes, epoch)
            await _note(session, training, "saved", {"name": file.name, "epoch": epoch, "size_bytes": file.size_bytes})
        case facts.Preview(file, epoch, prompt):
            await _note(session, training, "preview", {"name": file.name, "epoch": epoch, "prompt": prompt[:_MAX_LINE]})
        case facts.Removed(name):
            training.forget(name)
        case facts.Kept(file, epoch):
            if training.state:
                await note_leftovers(session, [training.state["key"]])
            key = training.session_prefix(training.session) + file.name if training.session else file.name
            training.state = {"key": key, "size_bytes": file.size_bytes, "sha256": file.sha256, "epoch": epoch}
        case facts.Done():
            training.end(rows.COMPLETED)
        case facts.Failed(reason):
            training.end(rows.FAILED, reason)


async def _keep_last(session: AsyncSession, training: Training, fact: facts.Fact) -> None:
    """Keeps what was saved before a stop; nothing else matters any more."""
    match fact:
        case facts.Saved() | facts.Removed() | facts.Preview():
            await _keep(session, training, fact)
        case facts.Done() | facts.Failed():
            training.leave()


async def _progress(session: AsyncSession, training: Training, progress: facts.Progress) -> None:
    """Adds steps to the curve; steps of an earlier session give way."""
    latest = {point.step: point for point in progress.points}  # one statement takes each step once
    values = [{"training_id": training.id, **vars(point)} for point in latest.values()]
    if values:
        added = insert(Metric).values(values)
        names = ("epoch", "loss", "average_loss", "learning_rates")
        new = {name: added.excluded[name] for name in names}
        await session.execute(added.on_conflict_do_update(index_elements=["training_id", "step"], set_=new))
        training.progress = {
            **vars(progress.points[-1]),
            "num_steps": progress.num_steps,
            "num_epochs": progress.num_epochs,
            "seconds_left": progress.seconds_left,
        }


async def _note(session: AsyncSession, training: Training, kind: str, data: dict[str, object]) -> None:
    if kind == "log":
        lines = select(func.count()).select_from(Event).where(col(Event.training_id) == training.id)
        if (await session.scalar(lines) or 0) >= _MAX_LINES:
            return
    session.add(Event(training_id=training.id, kind=kind, data=data))
