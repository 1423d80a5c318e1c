"""Remembers tasks: what runs to its end on the GPUs that endpoints have too."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlmodel import col

from services.common.database import Database, notify
from services.common.errors import NotFound
from services.endpoints.rows import OPEN, Task, TaskState
from services.endpoints.store import CHANGED


class TaskNotFound(NotFound):
    """There is no such task, or not for this caller."""


class TaskStore:
    """The tasks' part of the endpoints' database. Each method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add_task(self, task: Task) -> Task:
        """Adds a task, unless one of this id is there; answers the one that is."""
        async with self._database.transaction() as session:
            await session.execute(insert(Task).values(task.model_dump()).on_conflict_do_nothing())
            await notify(session, CHANGED, task.id)
            return (await session.execute(select(Task).where(col(Task.id) == task.id))).scalar_one()

    async def get_task(self, task_id: str) -> Task:
        """The task.

        Raises:
            TaskNotFound.
        """
        async with self._database.transaction() as session:
            found = await session.get(Task, task_id)
        if found is None:
            raise TaskNotFound(f"task with id {task_id} is not found")
        return found

    async def get_uncleared(self) -> list[Task]:
        """Tasks for which something is to be done, the oldest first."""
        found = select(Task).where(~col(Task.is_cleared)).order_by(col(Task.creation_time), col(Task.id))
        async with self._database.transaction() as session:
            return list((await session.execute(found)).scalars())

    async def request_stop(self, task_id: str) -> None:
        """Remembers that somebody wants the task to end."""
        asked = update(Task).where(col(Task.id) == task_id, col(Task.state).in_(OPEN)).values(stop_requested=True)
        async with self._database.transaction() as session:
            await session.execute(asked)
            await notify(session, CHANGED, task_id)

    async def claim_attempt(self, task: Task) -> bool:
        """Records a process as the task's, unless another control loop was first.

        `task` is the row as read, with `num_attempts` raised by one and the new process in it.
        """
        values: dict[str, Any] = {"pid": task.pid, "start_time": task.start_time, "gpu": task.gpu}
        values |= {"num_attempts": task.num_attempts, "state": TaskState.RUNNING, "reason": ""}
        values |= {"begin_time": func.coalesce(col(Task.begin_time), func.clock_timestamp())}
        return await self._change(task.id, col(Task.num_attempts) == task.num_attempts - 1, values)

    async def set_state(self, task_id: str, state: TaskState, num_attempts: int, num_failed: int, reason: str) -> bool:
        """Remembers what became of the task after so many attempts. One that does not run has no process.

        False: it has ended already, or another control loop has begun it again meanwhile.
        """
        values: dict[str, Any] = {"state": state, "num_attempts": num_attempts, "reason": reason}
        values["num_failed"] = num_failed
        if state == TaskState.RUNNING:
            values["begin_time"] = func.coalesce(col(Task.begin_time), func.clock_timestamp())
        else:
            values |= {"pid": None, "start_time": None, "gpu": None}
        if state not in OPEN:
            values["end_time"] = func.clock_timestamp()
        return await self._change(task_id, col(Task.num_attempts) <= num_attempts, values)

    async def set_cleared(self, task_id: str) -> None:
        """Remembers that nothing is left of the task but its row."""
        async with self._database.transaction() as session:
            await session.execute(update(Task).where(col(Task.id) == task_id).values(is_cleared=True))

    async def remove_ended(self, before: datetime) -> None:
        """Removes tasks that ended before this time."""
        old = delete(Task).where(col(Task.end_time) < before, col(Task.is_cleared))
        async with self._database.transaction() as session:
            await session.execute(old)

    async def _change(self, task_id: str, as_known: ColumnElement[bool], values: Mapping[str, Any]) -> bool:
        known = col(Task.id) == task_id, col(Task.state).in_(OPEN), as_known
        async with self._database.transaction() as session:
            result: Any = await session.execute(update(Task).where(*known).values(**values))
            return bool(result.rowcount)
