"""Owns what workers and tasks of this machine have in common: their processes, files, environment, and its GPUs."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from services.endpoints.cluster import worker_settings
from services.endpoints.cluster.gpus import Shares
from services.endpoints.cluster.process import Processes
from services.endpoints.rows import TaskState
from services.endpoints.store import EndpointStore
from services.endpoints.task_store import TaskStore

# What a process inherits. It gets no other variable: the service's own name the database and its secret.
_INHERITED = {"PATH", "HOME", "USER", "TMPDIR", "TZ", "LANG", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "SSL_CERT_FILE"}
_INHERITED |= {"ESD_LAUNCHER_PID", "ESD_LOG_FORMAT", "ESD_CACHE_MAX_BYTES"}
_INHERITED_PREFIXES = ("LC_", "PYTHON", "CUDA_", "NVIDIA_", "PYTORCH_", "OMP_", "MKL_", "HF_")


@dataclass(frozen=True)
class LocalSettings:
    """How workers and tasks are run. `folder` keeps their secrets and logs, and the model cache.

    `gpus` are shared out; where there are none, `max_cpu_tasks` tasks run at a time.
    """

    command: list[str]
    folder: Path
    server_url: str
    verifying_key_file: Path
    device: str
    gpus: list[str]
    tasks_first: bool = False
    max_cpu_tasks: int = 1
    # How long who is stopped may take to finish its work, and then to leave, before it is killed.
    drain_seconds: float = 60.0
    leave_seconds: float = 10.0

    @property
    def stop_seconds(self) -> float:
        """How long who is stopped may take altogether."""
        return self.drain_seconds + self.leave_seconds


class Machine:
    """This machine. An owner is an endpoint or a task, by its id."""

    def __init__(
        self, settings: LocalSettings, endpoints: EndpointStore, tasks: TaskStore, on_change: Callable[[], None]
    ) -> None:
        self.settings = settings
        self.processes = Processes(on_change)
        self.starting = asyncio.Lock()  # so that no two choose the same GPU
        self._endpoints = endpoints
        self._tasks = tasks

    async def shares(self) -> Shares:
        """Who has the GPUs now."""
        workers, tasks = await self._endpoints.get_workers(), await self._tasks.get_uncleared()
        return Shares(
            gpus=tuple(self.settings.gpus),
            workers=tuple(worker.gpu for worker in workers if worker.pid),
            tasks=tuple(task.gpu for task in tasks if task.pid),
            num_waiting_workers=sum(not worker.pid for worker in workers),
            num_waiting_tasks=sum(task.state == TaskState.WAITING and not task.stop_requested for task in tasks),
            tasks_first=self.settings.tasks_first,
        )

    async def place_for_task(self) -> tuple[str | None, str]:
        """The GPU for a task that is to begin now, or what it waits for; on a machine without any there is no GPU."""
        shares = await self.shares()
        if not shares.gpus:
            num_running, bound = len(shares.tasks), self.settings.max_cpu_tasks
            return None, "" if num_running < bound else f"it waits until fewer than {bound} other tasks run"
        gpu = shares.for_task()
        return gpu, "" if gpu is not None else f"it waits for a GPU: all {len(shares.gpus)} are in use"

    def folder(self, owner_id: str) -> Path:
        """Where the owner's files are."""
        return self.settings.folder / owner_id

    def secret_file(self, owner_id: str) -> Path:
        """Where the owner's secret is."""
        return self.folder(owner_id) / "secret"

    def save_secret(self, owner_id: str, secret: str) -> None:
        """Writes the secret's file, readable for this user only."""
        path = self.secret_file(owner_id)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        unfinished = path.with_suffix(".new")
        unfinished.touch(mode=0o600)
        unfinished.write_text(secret)
        unfinished.replace(path)

    def forget(self, owner_id: str) -> None:
        """Removes the owner's files."""
        shutil.rmtree(self.folder(owner_id), ignore_errors=True)

    def owners(self) -> Iterator[str]:
        """The owners of files."""
        for secret in self.settings.folder.glob("*/secret"):
            yield secret.parent.name

    def environment(self, owner_id: str, gpu: str | None) -> dict[str, str]:
        """What every process of the owner gets."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if name in _INHERITED or name.startswith(_INHERITED_PREFIXES)
        }
        own = {
            "ESD_SERVER_URL": self.settings.server_url,
            "ESD_SECRET_FILE": str(self.secret_file(owner_id)),
            "ESD_CACHE_DIR": str(self.settings.folder / "cache"),
            "ESD_DEVICE": self.settings.device,
            "ESD_VERIFYING_KEY_FILE": str(self.settings.verifying_key_file),
            "ESD_DRAIN_SECONDS": str(self.settings.drain_seconds),
        }
        return kept | worker_settings() | own | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
