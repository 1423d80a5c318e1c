"""Owns the processes that tests start."""

import os
import signal
import subprocess
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[1]


class running:  # noqa: N801 - read as a phrase: with running(command)
    """A process that runs during the block, and is ended by `signum` then; what it says goes to `log`, or where the
    test's own words go."""

    def __init__(
        self,
        command: list[str],
        environment: dict[str, str],
        log: IO[bytes] | None = None,
        signum: signal.Signals = signal.SIGTERM,
    ) -> None:
        self._command, self._environment, self._log, self._signum = command, environment, log, signum

    def __enter__(self) -> "subprocess.Popen[bytes]":
        self.process = subprocess.Popen(self._command, env=self._environment, cwd=ROOT, stdout=self._log)
        return self.process

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(self._signum)
        try:
            self.process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def process_environment() -> dict[str, str]:
    """This environment without settings of ESD."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ESD_")}
    return {**kept, "PYTHONUNBUFFERED": "1"}
