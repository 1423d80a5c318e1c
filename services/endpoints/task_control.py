"""Owns what the control loop does for tasks: begins them, ends those that should not run any more, and clears up.

Where several services run, only the one that leads does this (reconcile.py); what it did is in the row, so it does not
matter which one goes on.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import structlog

from services.common.auth import Kind
from services.common.errors import EsdError
from services.endpoints.cluster import Cluster, TaskStatus
from services.endpoints.peers import Identity
from services.endpoints.rows import Task, TaskState
from services.endpoints.task_store import TaskStore

log = structlog.get_logger()

KEPT = timedelta(days=7)  # how long a task that has ended is known


class TaskControl:
    """Keeps every task as its row says. `wake` brings the next round, for what follows from a change."""

    def __init__(self, store: TaskStore, identity: Identity, cluster: Cluster, wake: asyncio.Event) -> None:
        self._store = store
        self._identity = identity
        self._cluster = cluster
        self._wake = wake

    async def owner_ids(self) -> list[str]:
        """The ids of the tasks that may have something in the cluster."""
        return [task.id for task in await self._store.get_uncleared()]

    async def reconcile(self) -> datetime | None:
        """Looks at each task once, the oldest first, so that they begin in this order; answers the next deadline."""
        tasks = await self._store.get_uncleared()
        for task in tasks:
            try:
                await self._reconcile_task(task)
            except EsdError as error:
                log.warning("a task waits", task_id=task.id, error=str(error))
            except Exception:  # one task's trouble is not the others'
                log.exception("a task cannot be reconciled", task_id=task.id)
        now = datetime.now(UTC)
        await self._store.remove_ended(now - KEPT)
        return min((task.deadline for task in tasks if task.deadline and task.deadline > now), default=None)

    async def _reconcile_task(self, task: Task) -> None:
        if task.has_ended:
            await self._clear(task)
            return
        is_overdue = task.deadline is not None and datetime.now(UTC) >= task.deadline
        should_run = not task.stop_requested and not is_overdue
        if should_run and not await self._cluster.has_secret(task.id):
            secret = await self._identity.create_secret(Kind.TRAINER, task.id)
            await self._cluster.save_secret(task.id, secret)
        found = await self._cluster.apply_task(task, should_run)
        now = found if should_run or found.state == TaskState.RUNNING else _ended(task, found)
        if now == TaskStatus.of(task, TaskState(task.state), task.reason):
            return
        if await self._store.set_state(task.id, now.state, now.num_attempts, now.num_failed, now.reason):
            self._wake.set()  # it has a deadline now, or left a GPU, or is to be cleared up
            log.info("a task has changed", task_id=task.id, state=now.state, reason=now.reason)

    async def _clear(self, task: Task) -> None:
        await self._identity.delete_secret(Kind.TRAINER, task.id)
        await self._cluster.forget(task.id)
        await self._store.set_cleared(task.id)


def _ended(task: Task, found: TaskStatus) -> TaskStatus:
    """What a task is that should not run any more, and does not."""
    if task.stop_requested:
        return replace(found, state=TaskState.STOPPED, reason="")
    took = f"it took longer than its {task.deadline_seconds} seconds"
    return replace(found, state=TaskState.FAILED, reason=took)
