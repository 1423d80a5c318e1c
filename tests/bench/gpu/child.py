"""A section's process: imports, waits for its turn, measures, and writes what it found after each figure."""

from __future__ import annotations

import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.bench.gpu.__main__ import machine


class Report:
    """A section's figures in a file. `device` is where it measures, `tiny` whether models are."""

    def __init__(self, name: str, path: Path, tiny: bool) -> None:
        self.name = name
        self.tiny = tiny
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._path = path
        self._began = time.monotonic()
        self._ends_at = self._began
        self._rows: list[dict[str, Any]] = []
        self._error = ""

    @property
    def seconds_left(self) -> float:
        """Until the section should have ended."""
        return self._ends_at - time.monotonic()

    def wait_for_turn(self) -> None:
        """The line says how many seconds there are."""
        self._path.with_suffix(".ready").touch()
        line = sys.stdin.readline()
        if not line:
            raise SystemExit(1)
        self._began = time.monotonic()
        self._ends_at = self._began + float(line)

    def add(self, what: str, **numbers: Any) -> None:
        """A row of figures."""
        self._rows.append({"what": what, **numbers})
        print(what, numbers, flush=True)
        self.write()

    def attempt(self, what: str, measure: Callable[[], dict[str, Any]], needs_seconds: float = 5) -> None:
        """Adds the figures of a measurement. One that fails, or has no time, costs its own figures only."""
        if self.seconds_left < needs_seconds:
            return self.add(what, skipped=f"{self.seconds_left:.0f} s were left")
        try:
            found = measure()
        except Exception as error:
            traceback.print_exc()
            first_line = str(error).partition("\n")[0]
            found = {"failed": f"{type(error).__name__}: {first_line}"[:200]}
        return self.add(what, **found)

    def fail(self, error: BaseException) -> None:
        """The section cannot go on."""
        self._error = f"{type(error).__name__}: {error}"[:300]
        self.write()

    def write(self) -> None:
        """Writes everything, for whoever looks next."""
        found = {
            "machine": machine(self.device),
            "seconds": time.monotonic() - self._began,
            "error": self._error,
            "rows": self._rows,
        }
        if self.device == "cuda":
            found["peak_bytes"] = torch.cuda.max_memory_allocated()
        temporary = self._path.with_suffix(".new")
        temporary.write_text(json.dumps(found, indent=1))
        temporary.rename(self._path)


def run(name: str, out: Path, tiny: bool) -> int:
    """Does a section and answers the exit code."""
    warnings.simplefilter("ignore")  # of diffusers, about NumPy 2
    from tests.bench.gpu import sections

    report = Report(name, out / f"{name}.json", tiny)
    report.wait_for_turn()
    try:
        getattr(sections, name)(report)
        report.write()
    except Exception as error:
        traceback.print_exc()
        report.fail(error)
        return 1
    return 0
