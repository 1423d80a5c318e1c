"""Owns workers that are processes of this machine.

A worker runs in a session of its own and outlives this service: its pid and start time stand in its row, and the next
control loop adopts it. It does not outlive the launcher, whose pid it gets in its environment and watches itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import structlog

from services.endpoints.cluster import MAX_FAILURES, Pool, PoolStatus, TaskStatus
from services.endpoints.cluster.local_tasks import LocalTasks
from services.endpoints.cluster.machine import LocalSettings, Machine
from services.endpoints.cluster.process import Process
from services.endpoints.cluster.tail import last_words, shorten, why_given_up
from services.endpoints.rows import Task, Worker
from services.endpoints.store import EndpointStore
from services.endpoints.task_store import TaskStore

log = structlog.get_logger()


@dataclass(frozen=True)
class _Round:
    """What a round of the control loop reads once for all pools: workers, and the GPUs that are kept for tasks."""

    workers: dict[str, list[Worker]]
    kept_gpus: list[str]


class LocalCluster:
    """Runs workers as processes. `on_change` is called when one has ended, or may be tried again."""

    def __init__(
        self, store: EndpointStore, tasks: TaskStore, settings: LocalSettings, on_change: Callable[[], None]
    ) -> None:
        self._store = store
        self._machine = Machine(settings, store, tasks, on_change)
        self._tasks = LocalTasks(self._machine, tasks)
        self._exits: dict[str, int | None] = {}  # by the worker's key: of the process before, as Process.exit
        self._reading: asyncio.Task[_Round] | None = None

    async def has_secret(self, owner_id: str) -> bool:
        """Whether the secret's file is there."""
        return self._machine.secret_file(owner_id).exists()

    async def save_secret(self, owner_id: str, secret: str) -> None:
        """Writes the secret's file, readable for this user only."""
        self._machine.save_secret(owner_id, secret)

    async def apply(self, pool: Pool, num_workers: int, live: Collection[str]) -> PoolStatus:
        """Looks at each worker of the pool once: starts, stops, restarts, counts."""
        read = await self._read_once()
        workers = read.workers.get(pool.endpoint_id, [])
        for slot in set(range(num_workers)) - {worker.slot for worker in workers}:
            worker = Worker(endpoint_id=pool.endpoint_id, slot=slot)
            await self._store.add_worker(worker)
            workers.append(worker)
        num_running, obstacle = 0, ""
        for worker in workers:
            process = await self._process_of(worker)
            if process is None and worker.num_failures >= MAX_FAILURES and worker.slot < num_workers:
                code = self._exits.get(worker.key)  # None also where another control loop saw it end
                return PoolStatus(num_running, why_given_up(code, last_words(self._log_file(worker))))
            if process is None and worker.slot < num_workers:
                process, waits_for = await self._start(worker)
                obstacle = obstacle or waits_for
            elif process is None:
                await self._store.remove_worker(worker)
            elif worker.slot >= num_workers or worker.gpu in read.kept_gpus:
                process.stop(self._machine.settings.stop_seconds)
            elif worker.worker_id in live and not worker.was_live:
                await self._store.set_worker_live(worker)
            num_running += process is not None
        return PoolStatus(num_running, obstacle=obstacle)

    async def apply_task(self, task: Task, should_run: bool) -> TaskStatus:
        """Looks at the task once: starts it, stops it, starts it again."""
        return await self._tasks.apply(task, should_run)

    async def forget(self, owner_id: str) -> None:
        """Removes the owner's folder."""
        self._machine.forget(owner_id)

    async def remove_orphans(self, owner_ids: Collection[str]) -> None:
        """Removes folders. A process without a row has a secret that identity will refuse, and ends by itself."""
        for owner_id in set(self._machine.owners()) - set(owner_ids):
            log.warning("the folder of an endpoint or task that is not known is removed", owner_id=owner_id)
            await self.forget(owner_id)

    async def end(self) -> None:
        """Has all processes finish their work and leave, which nobody would come back to."""
        await self._machine.processes.end(self._machine.settings.stop_seconds)

    def close(self) -> None:
        """Lets go of all processes, which run on."""
        self._machine.processes.close()

    async def _read_once(self) -> _Round:
        """The rows that concern pools. A round asks for every endpoint at once, and all share one answer."""
        if self._reading is None:
            self._reading = asyncio.create_task(self._read())
        return await asyncio.shield(self._reading)

    async def _read(self) -> _Round:
        await asyncio.sleep(0)  # those who ask in this turn of the event loop share the answer
        self._reading = None  # those who ask later get a later one
        workers: dict[str, list[Worker]] = {}
        for worker in await self._store.get_workers():
            workers.setdefault(worker.endpoint_id, []).append(worker)
        kept = (await self._machine.shares()).kept_for_tasks() if self._machine.settings.tasks_first else []
        return _Round(workers, kept)

    async def _process_of(self, worker: Worker) -> Process | None:
        """The worker's running process; None if there is none, which the row says then."""
        if worker.pid is None:
            return None
        process = self._machine.processes.find(worker)
        if process is None:  # which says nothing about how it started
            await self._record_end(worker, worker.num_failures, "it ended while nobody watched")
            return None
        if not process.has_ended:
            shorten(self._log_file(worker))
            return process
        failed = not worker.was_live and not process.is_stopping
        words = last_words(self._log_file(worker))
        say = log.info if process.is_stopping else log.warning
        say("a worker ended", worker=worker.worker_id, exit=process.exit, last_words=words)
        self._exits[worker.key] = process.exit
        await self._record_end(worker, worker.num_failures + 1 if failed else 0, _how_it_ended(process, words))
        return None

    async def _record_end(self, worker: Worker, num_failures: int, reason: str) -> None:
        await self._store.set_worker_ended(worker, num_failures, reason)
        worker.pid, worker.start_time, worker.num_failures = None, None, num_failures
        if num_failures:
            self._machine.processes.pause(worker.key, num_failures)

    async def _start(self, worker: Worker) -> tuple[Process | None, str]:
        """Starts a process for the worker, or tells what it waits for; neither where it pauses, or another control
        loop was faster."""
        if self._machine.processes.is_pausing(worker.key):
            return None, ""
        async with self._machine.starting:
            gpus = self._machine.settings.gpus
            gpu = (await self._machine.shares()).for_worker() if gpus else None
            if gpu is None and gpus:  # the end of a task will tell
                return None, f"it waits for a GPU: tasks have all {len(gpus)}"
            worker.num_launches += 1
            worker.gpu = gpu
            environment = self._machine.environment(worker.endpoint_id, gpu) | {"ESD_WORKER_ID": worker.worker_id}
            command, log_file = self._machine.settings.command, self._log_file(worker)
            process = await self._machine.processes.start(
                worker, self._store.claim_launch, command, environment, log_file
            )
        if process is not None:
            log.info("a worker is started", worker=worker.worker_id, pid=process.pid, gpu=worker.gpu)
        return process, ""

    def _log_file(self, worker: Worker) -> Path:
        return self._machine.folder(worker.endpoint_id) / f"worker-{worker.slot}.log"


def _how_it_ended(process: Process, words: str) -> str:
    """One sentence for whoever reads the endpoint's events."""
    if process.was_killed:
        return "it did not finish in time and was killed"
    if process.is_stopping:
        return "it was asked to leave and left"
    code = "" if process.exit is None else f" with code {process.exit}"
    return f"it ended by itself{code}: {words}"
