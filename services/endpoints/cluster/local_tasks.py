"""Owns tasks that are processes of this machine.

A task's process is held as a worker's is: in a session of its own, with pid and start time in its row, adopted by the
next control loop, gone when the launcher is. How it ended stands in a file beside its log, so it does not matter who
watched.
"""

from __future__ import annotations

from pathlib import Path

import structlog

from services.common.process import EXIT_INTERRUPTED
from services.endpoints.cluster import TaskStatus
from services.endpoints.cluster.machine import Machine
from services.endpoints.cluster.tail import how_it_ended, last_words
from services.endpoints.rows import Task, TaskState
from services.endpoints.task_store import TaskStore

log = structlog.get_logger()


class LocalTasks:
    """Runs tasks as processes."""

    def __init__(self, machine: Machine, store: TaskStore) -> None:
        self._machine = machine
        self._store = store

    async def apply(self, task: Task, should_run: bool) -> TaskStatus:
        """Looks at the task once: starts it, stops it, starts it again; says what became of it."""
        if task.pid is not None:
            process = self._machine.processes.find(task)
            if process is None or process.has_ended:
                return self._how_it_ended(task)
            if not should_run:
                process.stop(self._machine.settings.stop_seconds)
            return TaskStatus.of(task, TaskState.RUNNING)
        if not should_run:
            return TaskStatus.of(task, TaskState.WAITING)
        return await self._start(task)

    def _how_it_ended(self, task: Task) -> TaskStatus:
        code = self._exit_code(task)
        if code == 0:
            return TaskStatus.of(task, TaskState.SUCCEEDED)
        if code == EXIT_INTERRUPTED:
            log.info("an attempt of a task was interrupted", task_id=task.id, attempt=task.num_attempts)
            reason = f"attempt {task.num_attempts} was interrupted, which counts for none"
            return self._again(task, task.num_failed, reason)
        words = last_words(self._log_file(task))
        if task.stop_requested:  # as by a training that has told its service how it ended
            log.info("a task was stopped", task_id=task.id, attempt=task.num_attempts, exit=code)
        else:
            ended = {"attempt": task.num_attempts, "exit": code, "last": words}
            log.warning("an attempt of a task failed", task_id=task.id, **ended)
        num_failed = task.num_failed + 1
        reason = f"it {how_it_ended(code)}: {words}"
        if num_failed >= task.max_attempts:
            return TaskStatus(TaskState.FAILED, task.num_attempts, num_failed, reason)
        return self._again(task, num_failed, f"attempt {num_failed} of {task.max_attempts} failed: {reason}")

    def _again(self, task: Task, num_failed: int, reason: str) -> TaskStatus:
        """Has the task begun again, the later the more often it has failed."""
        self._machine.processes.pause(task.key, num_failed)
        return TaskStatus(TaskState.WAITING, task.num_attempts, num_failed, reason)

    async def _start(self, task: Task) -> TaskStatus:
        """Starts a process for the task, unless it has to wait or another control loop was faster."""
        waiting = TaskStatus.of(task, TaskState.WAITING, task.reason)
        if self._machine.processes.is_pausing(task.key):
            return waiting
        async with self._machine.starting:
            gpu, obstacle = await self._machine.place_for_task()
            if obstacle:
                return TaskStatus.of(task, TaskState.WAITING, obstacle)
            begun = task.model_copy(update={"num_attempts": task.num_attempts + 1, "gpu": gpu})
            command = [*self._machine.settings.command, task.kind]
            environment = self._machine.environment(task.id, gpu) | {"ESD_TASK_ID": task.id}
            files = self._log_file(begun), self._exit_file(begun)
            process = await self._machine.processes.start(
                begun, self._store.claim_attempt, command, environment, *files
            )
        if process is None:
            return waiting
        log.info("a task is begun", task_id=task.id, attempt=begun.num_attempts, pid=process.pid, gpu=gpu)
        return TaskStatus.of(begun, TaskState.RUNNING)

    def _exit_code(self, task: Task) -> int | None:
        """What the command ended with; None where it was killed together with the shell that would have known."""
        try:
            return int(self._exit_file(task).read_text())
        except FileNotFoundError:
            return None

    # Each attempt has files of its own: a control loop that was late may have begun the same one, and been refused.
    def _log_file(self, task: Task) -> Path:
        return self._machine.folder(task.id) / f"attempt-{task.num_attempts}.log"

    def _exit_file(self, task: Task) -> Path:
        return self._machine.folder(task.id) / f"attempt-{task.num_attempts}.exit"
