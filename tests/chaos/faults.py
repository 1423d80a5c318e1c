"""What goes wrong: processes that are killed or freeze, lines that are cut or held up."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime

import psutil

from deploy.local.home import SERVICES
from deploy.local.stack import Stack
from tests.line import Line

# One round; what jobs hang on most comes twice.
KINDS = (
    *("worker", "worker", "frozen worker", "cut line", "held line", "inference", "inference"),
    *(name for name in SERVICES if name != "inference"),
    *("gateway", "postgres", "swift"),
)
_HELD_SECONDS = (0.5, 20.0)  # at times longer than a lease
_TRIES = 40
_PAUSE_SECONDS = 0.25


class Faults:
    """Does harm, one at a time, and remembers when it did what."""

    def __init__(self, stack: Stack, line: Line, rng: random.Random) -> None:
        self.log: list[tuple[datetime, str]] = []
        self.counts: Counter[str] = Counter()
        self._stack = stack
        self._line = line
        self._rng = rng
        self._kinds = self._shuffled()
        self._passing: set[asyncio.Task[None]] = set()

    async def strike(self) -> None:
        """The next fault; waits for something that it can be done to."""
        kind = next(self._kinds)
        for _ in range(_TRIES):
            if (what := self._do(kind)) is not None:
                self.log.append((datetime.now(UTC), what))
                self.counts[kind] += 1
                return
            await asyncio.sleep(_PAUSE_SECONDS)  # what is to be hit is down already
        raise RuntimeError(f"there was nothing to hit for the fault {kind!r}")

    async def over(self) -> None:
        """Returns when what passes by itself has passed: frozen workers go on, lines let through."""
        await asyncio.gather(*self._passing)

    def _shuffled(self) -> Iterator[str]:
        while True:
            yield from self._rng.sample(KINDS, len(KINDS))

    def _do(self, kind: str) -> str | None:
        """Does it; answers what was done in words, None if there is nothing to do it to."""
        if kind in {"cut line", "held line"}:
            return self._harm_line(kind)
        if kind in {"worker", "frozen worker"}:
            return self._harm_worker(kind)
        pids = {name: pid for name, pid in self._stack.processes().items() if name.partition("-")[0] == kind}
        if not pids:
            return None
        name = self._rng.choice(sorted(pids))
        # PostgreSQL is sometimes restarted as an operator would do it; it then closes its connections itself.
        signum = self._rng.choice([signal.SIGINT, signal.SIGKILL]) if kind == "postgres" else signal.SIGKILL
        os.kill(pids[name], signum)
        return f"{signum.name} to {name}"

    def _harm_line(self, kind: str) -> str | None:
        connection = self._line.pick(self._rng)
        if connection is None:
            return None
        if kind == "cut line":
            connection.cut()
            return "a worker's line cut"
        seconds = self._rng.uniform(*_HELD_SECONDS)
        self._later(connection.hold(seconds))
        return f"a worker's line held for {seconds:.1f} s"

    def _harm_worker(self, kind: str) -> str | None:
        found = workers(self._stack)
        if not found:
            return None
        process = self._rng.choice(found)
        if kind == "worker":
            process.kill()
            return f"SIGKILL to worker {process.pid}"
        seconds = self._rng.uniform(*_HELD_SECONDS)
        process.suspend()
        self._later(_resume(process, seconds))
        return f"worker {process.pid} frozen for {seconds:.1f} s"

    def _later(self, passing: object) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(passing)  # type: ignore[arg-type]
        self._passing.add(task)


def workers(stack: Stack) -> list[psutil.Process]:
    """The worker processes of a stack whose command is ours."""
    found = []
    for process in psutil.Process(stack.launcher_pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "tests.chaos.worker" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


async def _resume(process: psutil.Process, seconds: float) -> None:
    await asyncio.sleep(seconds)
    with contextlib.suppress(psutil.NoSuchProcess):  # it was killed meanwhile
        process.resume()
