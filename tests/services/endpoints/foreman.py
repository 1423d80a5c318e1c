"""Owns whom the stand-in tasks ask what to do: each process says who it is on a Unix socket, and waits for its end."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Foreman:
    """Listens at `path` while the block runs."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._arrivals: dict[str, asyncio.Queue[Any]] = {}
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Foreman:
        self._server = await asyncio.start_unix_server(self._meet, self._path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in self._writers:
            writer.close()

    @property
    def command(self) -> list[str]:
        """What a task runs; a word may be added, and the kind of the task comes behind."""
        return [sys.executable, "-m", "tests.services.endpoints.standin_task", str(self._path)]

    async def next(self, task_id: str) -> tuple[dict[str, Any], Callable[..., None]]:
        """The task's next process: what it said, and how to end it, with a code and last words."""
        said, writer = await asyncio.wait_for(self._queue(task_id).get(), 90)

        def end(code: int = 0, words: str = "") -> None:
            writer.write(json.dumps({"code": code, "words": words}).encode() + b"\n")

        return said, end

    def has_met(self, task_id: str) -> bool:
        """Whether a process of the task came that nobody has asked for."""
        return not self._queue(task_id).empty()

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said = json.loads(await reader.readline())
        self._writers.append(writer)
        self._queue(said["task_id"]).put_nowait((said, writer))

    def _queue(self, task_id: str) -> asyncio.Queue[Any]:
        return self._arrivals.setdefault(task_id, asyncio.Queue())


def worker_or_task(foreman: Foreman) -> list[str]:
    """A command that is a stand-in worker, or with a word behind it a stand-in task."""
    worker = f"{sys.executable} -m tests.services.endpoints.standin_worker"
    choice = f'case "$#" in 0) exec {worker};; *) exec {" ".join(foreman.command)} "$@";; esac'
    return ["/bin/sh", "-c", choice, "sh"]
