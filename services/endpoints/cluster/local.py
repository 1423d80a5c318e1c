"""Owns workers that are processes of this machine.

A worker runs in a session of its own and outlives this service: its pid and start time stand in its row, and the next
control loop adopts it. It does not outlive the launcher, whose pid it gets in its environment and watches itself.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import structlog

from services.endpoints.cluster import Pool, PoolState
from services.endpoints.cluster.process import Process, start
from services.endpoints.cluster.tail import last_words
from services.endpoints.store import EndpointStore, Worker

log = structlog.get_logger()

MAX_FAILURES = 3
_FIRST_BACKOFF_SECONDS = 0.5  # doubled at each further failure
# What a worker inherits. It gets no other variable: the service's own name the database and its secret.
_INHERITED = {"PATH", "HOME", "USER", "TMPDIR", "TZ", "LANG", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "SSL_CERT_FILE"}
_INHERITED_PREFIXES = ("LC_", "PYTHON", "CUDA_", "NVIDIA_", "PYTORCH_", "OMP_", "MKL_", "HF_")
_INHERITED_SETTINGS = {
    "ESD_LAUNCHER_PID",
    "ESD_LOG_FORMAT",
    "ESD_LOG_LEVEL",
    "ESD_NUM_THREADS",
    "ESD_CACHE_MAX_BYTES",
    "ESD_MAX_RESIDENT_MODELS",
}


@dataclass(frozen=True)
class LocalSettings:
    """How workers are run. `folder` keeps secrets, logs and the model cache; `gpus` are shared out one per worker."""

    command: list[str]
    folder: Path
    server_url: str
    verifying_key_file: Path
    device: str
    gpus: list[str]
    # How long a worker that is stopped may take to finish its job, and then to leave, before it is killed.
    drain_seconds: float = 60.0
    leave_seconds: float = 10.0


class LocalCluster:
    """Runs workers as processes. `on_change` is called when one has ended, or may be tried again."""

    def __init__(self, store: EndpointStore, settings: LocalSettings, on_change: Callable[[], None]) -> None:
        self._store = store
        self._settings = settings
        self._on_change = on_change
        self._processes: dict[tuple[str, int], Process] = {}
        self._not_before: dict[tuple[str, int], float] = {}  # the loop's time
        self._exits: dict[tuple[str, int], int | None] = {}  # of the process before, as Process.exit
        self._reading: asyncio.Task[dict[str, list[Worker]]] | None = None
        self._starting = asyncio.Lock()  # so that two endpoints do not choose the same GPU

    async def has_secret(self, endpoint_id: str) -> bool:
        """Whether the secret's file is there."""
        return self._secret_file(endpoint_id).exists()

    async def save_secret(self, endpoint_id: str, secret: str) -> None:
        """Writes the secret's file, readable for this user only."""
        _write_secret(self._secret_file(endpoint_id), secret)

    async def apply(self, pool: Pool, num_workers: int, live: Collection[str]) -> PoolState:
        """Looks at each worker of the pool once: starts, stops, restarts, counts."""
        workers = await self._workers_of(pool.endpoint_id)
        for slot in set(range(num_workers)) - {worker.slot for worker in workers}:
            await self._store.add_worker(pool.endpoint_id, slot)
            workers.append(Worker(endpoint_id=pool.endpoint_id, slot=slot))
        num_running = 0
        for worker in workers:
            process = await self._process_of(worker)
            if process is None and worker.num_failures >= MAX_FAILURES and worker.slot < num_workers:
                return PoolState(num_running, self._failure(worker))
            if process is None and worker.slot < num_workers:
                process = await self._start(worker)
            elif process is None:
                await self._store.remove_worker(worker)
            elif worker.slot >= num_workers:
                process.stop(self._settings.drain_seconds + self._settings.leave_seconds)
            elif worker.worker_id in live and not worker.was_live:
                await self._store.set_worker_live(worker)
            num_running += process is not None
        return PoolState(num_running)

    async def forget(self, endpoint_id: str) -> None:
        """Removes the endpoint's folder."""
        shutil.rmtree(self._folder(endpoint_id), ignore_errors=True)

    async def remove_orphans(self, endpoint_ids: Collection[str]) -> None:
        """Removes folders. A process without a row has a secret that identity will refuse, and ends by itself."""
        for secret in self._settings.folder.glob("*/secret"):
            if secret.parent.name not in endpoint_ids:
                log.warning("the folder of an endpoint that is not known is removed", endpoint_id=secret.parent.name)
                await self.forget(secret.parent.name)

    def close(self) -> None:
        """Lets go of all processes, which run on."""
        for process in self._processes.values():
            process.let_go()
        self._processes.clear()

    async def _workers_of(self, endpoint_id: str) -> list[Worker]:
        """The rows of an endpoint's workers. A round asks for every endpoint at once, and all share one statement."""
        if self._reading is None:
            self._reading = asyncio.create_task(self._read_workers())
        return (await asyncio.shield(self._reading)).get(endpoint_id, [])

    async def _read_workers(self) -> dict[str, list[Worker]]:
        await asyncio.sleep(0)  # those who ask in this turn of the event loop share the answer
        self._reading = None  # those who ask later get a later one
        found: dict[str, list[Worker]] = {}
        for worker in await self._store.get_workers():
            found.setdefault(worker.endpoint_id, []).append(worker)
        return found

    async def _process_of(self, worker: Worker) -> Process | None:
        """The worker's running process, adopted if it is not known; None if there is none, which the row says then."""
        if worker.pid is None or worker.start_time is None:
            return None
        key = (worker.endpoint_id, worker.slot)
        process = self._processes.get(key)
        if process is not None and (process.pid, process.start_time) != (worker.pid, worker.start_time):
            self._processes.pop(key).let_go()  # another control loop has replaced it meanwhile
            process = None
        if process is None:
            process = Process.adopt(worker.pid, worker.start_time, self._on_change)
            if process is None:  # it ended while nobody watched, which says nothing about how it started
                await self._record_end(worker, worker.num_failures, "it ended while nobody watched")
                return None
            log.info("a worker is adopted", worker=worker.worker_id, pid=process.pid)
            self._processes[key] = process
        if not process.has_ended:
            return process
        del self._processes[key]
        failed = not worker.was_live and not process.is_stopping
        words = last_words(self._log_file(worker))
        log.warning("a worker ended", worker=worker.worker_id, exit=process.exit, last_words=words)
        self._exits[key] = process.exit
        await self._record_end(worker, worker.num_failures + 1 if failed else 0, _how_it_ended(process, words))
        return None

    async def _record_end(self, worker: Worker, num_failures: int, reason: str) -> None:
        await self._store.set_worker_ended(worker, num_failures, reason)
        worker.pid, worker.start_time, worker.num_failures = None, None, num_failures
        if num_failures:
            loop = asyncio.get_running_loop()
            delay = _FIRST_BACKOFF_SECONDS * 2 ** (num_failures - 1)
            self._not_before[worker.endpoint_id, worker.slot] = loop.time() + delay
            loop.call_later(delay, self._on_change)

    async def _start(self, worker: Worker) -> Process | None:
        """Starts a process for the worker, unless its back-off lasts or another control loop was faster."""
        key = (worker.endpoint_id, worker.slot)
        if asyncio.get_running_loop().time() < self._not_before.get(key, 0):
            return None
        async with self._starting:
            worker.num_launches += 1
            worker.gpu = await self._choose_gpu()
            process, release = start(
                self._settings.command, self._environment(worker), self._log_file(worker), self._on_change
            )
            worker.pid, worker.start_time = process.pid, process.start_time
            claimed = False
            try:
                claimed = await self._store.claim_launch(worker)
            finally:
                release(claimed)  # not claimed: the process ends without having run the command
        if not claimed:
            return None
        self._processes[key] = process
        log.info("a worker is started", worker=worker.worker_id, pid=process.pid, gpu=worker.gpu)
        return process

    async def _choose_gpu(self) -> str | None:
        if not self._settings.gpus:
            return None
        return choose_gpu(self._settings.gpus, [row.gpu for row in await self._store.get_workers() if row.pid])

    def _environment(self, worker: Worker) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if name in _INHERITED | _INHERITED_SETTINGS or name.startswith(_INHERITED_PREFIXES)
        }
        own = {
            "ESD_SERVER_URL": self._settings.server_url,
            "ESD_SECRET_FILE": str(self._secret_file(worker.endpoint_id)),
            "ESD_CACHE_DIR": str(self._settings.folder / "cache"),
            "ESD_DEVICE": self._settings.device,
            "ESD_VERIFYING_KEY_FILE": str(self._settings.verifying_key_file),
            "ESD_DRAIN_SECONDS": str(self._settings.drain_seconds),
            "ESD_WORKER_ID": worker.worker_id,
        }
        return kept | own | ({} if worker.gpu is None else {"CUDA_VISIBLE_DEVICES": worker.gpu})

    def _failure(self, worker: Worker) -> str:
        code = self._exits.get((worker.endpoint_id, worker.slot))  # None also where another control loop saw it end
        how = "ended" if code is None else f"ended with code {code}"
        words = last_words(self._log_file(worker)) or "its log is empty"
        return f"a worker failed to start {worker.num_failures} times in a row; the last one {how}: {words}"

    def _folder(self, endpoint_id: str) -> Path:
        return self._settings.folder / endpoint_id

    def _secret_file(self, endpoint_id: str) -> Path:
        return self._folder(endpoint_id) / "secret"

    def _log_file(self, worker: Worker) -> Path:
        return self._folder(worker.endpoint_id) / f"worker-{worker.slot}.log"


def choose_gpu(gpus: list[str], taken: Iterable[str | None]) -> str:
    """The GPU with the fewest workers, the first of those; `taken` are the GPUs of the workers that run."""
    num_workers = Counter(taken)
    return min(gpus, key=lambda gpu: num_workers[gpu])


def find_gpus() -> list[str]:
    """The GPUs of this machine, as CUDA_VISIBLE_DEVICES names them."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in visible.split(",") if gpu.strip()]
    return [str(index) for index, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def _how_it_ended(process: Process, words: str) -> str:
    """One sentence for whoever reads the endpoint's events."""
    if process.was_killed:
        return "it did not finish in time and was killed"
    if process.is_stopping:
        return "it was asked to leave and left"
    code = "" if process.exit is None else f" with code {process.exit}"
    return f"it ended by itself{code}: {words or 'its log is empty'}"


def _write_secret(path: Path, secret: str) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    unfinished = path.with_suffix(".new")
    unfinished.touch(mode=0o600)
    unfinished.write_text(secret)
    unfinished.replace(path)
