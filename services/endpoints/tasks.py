"""Decides who may run what to its end on the GPUs of the endpoints."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from services.common.errors import PermissionDenied
from services.endpoints.rows import Task
from services.endpoints.task_store import TaskNotFound, TaskStore

TRAIN = "train"
# Which service a kind of task belongs to. What runs is the worker's command with the kind as its word.
_SERVICE_OF = {TRAIN: "training"}


@dataclass(frozen=True)
class NewTask:
    """What a service asks for; `deadline_seconds` is None where the task may take as long as it likes."""

    task_id: str
    kind: str
    instance_type: str
    max_attempts: int
    deadline_seconds: int | None


class Tasks:
    """The domain of tasks. Callers are services, and see their own tasks only."""

    def __init__(self, store: TaskStore) -> None:
        self._store = store

    async def start_task(self, new: NewTask, service: str) -> Task:
        """Asks for a task, which the control loop begins; one that is there already stays as it is.

        Raises:
            PermissionDenied: the service has no tasks of this kind.
        """
        if _SERVICE_OF[new.kind] != service:
            raise PermissionDenied(f"the {service} service runs no tasks of the kind {new.kind}")
        task = Task(
            id=new.task_id,
            kind=new.kind,
            service=service,
            instance_type=new.instance_type,
            max_attempts=new.max_attempts,
            deadline_seconds=new.deadline_seconds,
            creation_time=datetime.now(UTC),
        )
        return await self._store.add_task(task)

    async def get_task(self, task_id: str, service: str) -> Task:
        """The task.

        Raises:
            TaskNotFound: it is not there, or another service's.
        """
        task = await self._store.get_task(task_id)
        if task.service != service:
            raise TaskNotFound(f"task with id {task_id} is not found")
        return task

    async def stop_task(self, task_id: str, service: str) -> None:
        """Lets the control loop end the task.

        Raises:
            TaskNotFound.
        """
        await self.get_task(task_id, service)
        await self._store.request_stop(task_id)
