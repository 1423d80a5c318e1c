"""Owns tasks that are processes of this machine.

A task's process is held as a worker's is: in a session of its own, with pid and start time in its row, adopted by the
next control loop, gone when the launcher is. How it ended stands in a file beside its log, so it does not matter who
watched.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import structlog

from services.common.process import EXIT_INTERRUPTED
from services.endpoints.cluster import TaskState
from services.endpoints.cluster.machine import FIRST_BACKOFF_SECONDS, Machine
from services.endpoints.cluster.process import Process, start
from services.endpoints.cluster.tail import how_it_ended, last_words
from services.endpoints.rows import State, Task
from services.endpoints.task_store import TaskStore

log = structlog.get_logger()


class LocalTasks:
    """Runs tasks as processes. `on_change` is called when one has ended, or may be begun again."""

    def __init__(self, machine: Machine, store: TaskStore, on_change: Callable[[], None]) -> None:
        self._machine = machine
        self._store = store
        self._on_change = on_change
        self._processes: dict[str, Process] = {}
        self._not_before: dict[str, float] = {}  # the loop's time

    async def apply(self, task: Task, should_run: bool) -> TaskState:
        """Looks at the task once: starts it, stops it, starts it again; says what became of it."""
        if task.pid is not None and task.start_time is not None:
            process = self._process_of(task, task.pid, task.start_time)
            if process is None:
                return self._how_it_ended(task)
            if not should_run:
                process.stop(self._machine.settings.stop_seconds)
            return TaskState.of(task, State.RUNNING)
        if not should_run:
            return TaskState.of(task, State.WAITING)
        return await self._start(task)

    def forget(self, task_id: str) -> None:
        """Forgets what is remembered of a task that has ended."""
        self._not_before.pop(task_id, None)

    def close(self) -> None:
        """Lets go of all processes, which run on."""
        for process in self._processes.values():
            process.let_go()
        self._processes.clear()

    def _process_of(self, task: Task, pid: int, start_time: str) -> Process | None:
        """The task's running process, adopted if it is not known; None if there is none."""
        process = self._processes.get(task.id)
        if process is not None and (process.pid, process.start_time) != (pid, start_time):
            self._processes.pop(task.id).let_go()  # another control loop has begun it again meanwhile
            process = None
        if process is None:
            process = Process.adopt(pid, start_time, self._on_change)
            if process is None:
                return None
            log.info("a task is adopted", task_id=task.id, pid=process.pid)
            self._processes[task.id] = process
        if not process.has_ended:
            return process
        del self._processes[task.id]
        return None

    def _how_it_ended(self, task: Task) -> TaskState:
        code = self._exit_code(task)
        if code == 0:
            return TaskState.of(task, State.SUCCEEDED)
        if code == EXIT_INTERRUPTED:
            log.info("an attempt of a task was interrupted", task_id=task.id, attempt=task.num_attempts)
            reason = f"attempt {task.num_attempts} was interrupted, which counts for none"
            return self._again(task, task.num_failed, reason)
        words = last_words(self._log_file(task)) or "its log is empty"
        if task.stop_requested:  # as by a training that has told its service how it ended
            log.info("a task was stopped", task_id=task.id, attempt=task.num_attempts, exit=code)
        else:
            ended = {"attempt": task.num_attempts, "exit": code, "last": words}
            log.warning("an attempt of a task failed", task_id=task.id, **ended)
        num_failed = task.num_failed + 1
        reason = f"it {how_it_ended(code)}: {words}"
        if num_failed >= task.max_attempts:
            return TaskState(State.FAILED, task.num_attempts, num_failed, reason)
        return self._again(task, num_failed, f"attempt {num_failed} of {task.max_attempts} failed: {reason}")

    def _again(self, task: Task, num_failed: int, reason: str) -> TaskState:
        """Has the task begun again, the later the more often it has failed."""
        loop = asyncio.get_running_loop()
        delay = FIRST_BACKOFF_SECONDS * 2 ** max(0, num_failed - 1)
        self._not_before[task.id] = loop.time() + delay
        loop.call_later(delay, self._on_change)
        return TaskState(State.WAITING, task.num_attempts, num_failed, reason)

    async def _start(self, task: Task) -> TaskState:
        """Starts a process for the task, unless it has to wait or another control loop was faster."""
        waiting = TaskState.of(task, State.WAITING, task.reason)
        if asyncio.get_running_loop().time() < self._not_before.get(task.id, 0):
            return waiting
        async with self._machine.starting:
            gpu, obstacle = await self._machine.place_for_task()
            if obstacle:
                return TaskState.of(task, State.WAITING, obstacle)
            begun = task.model_copy(update={"num_attempts": task.num_attempts + 1, "gpu": gpu})
            command = [*self._machine.settings.command, task.kind]
            environment = self._machine.environment(task.id, gpu) | {"ESD_TASK_ID": task.id}
            files = self._log_file(begun), self._exit_file(begun)
            process, release = start(command, environment, files[0], self._on_change, exit_file=files[1])
            begun.pid, begun.start_time = process.pid, process.start_time
            claimed = False
            try:
                claimed = await self._store.claim_attempt(begun)
            finally:
                release(claimed)  # not claimed: the process ends without having run the command
        if not claimed:
            return waiting
        self._processes[task.id] = process
        log.info("a task is begun", task_id=task.id, attempt=begun.num_attempts, pid=process.pid, gpu=gpu)
        return TaskState.of(begun, State.RUNNING)

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
