"""The programs that measure the engine still run: nothing else uses it as they do, and they are seldom started."""

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.bench.training import Report

pytestmark = pytest.mark.slow


def run(module: str, *arguments: str) -> str:
    """What the program prints."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_sharing_steps_gains_is_printed() -> None:
    printed = run("tests.bench.batching", "--steps", "2", "--repeats", "1", "--arrivals", "4")
    for row in ("128x128", "in the engine", "UniPC"):
        assert row in printed


@pytest.mark.parametrize("section", ["sd15", "memory"])
def test_sections_for_a_gpu_run_with_tiny_models(section: str, tmp_path: Path) -> None:
    run("tests.bench.gpu", "--tiny", "--out", str(tmp_path), "--section", section)
    found = json.loads((tmp_path / f"{section}.json").read_text())
    assert found["error"] == "", (tmp_path / f"{section}.log").read_text()
    assert found["rows"]


def test_every_part_of_the_training_bench_for_a_gpu_runs_with_tiny_models(tmp_path: Path) -> None:
    printed = run(
        "tests.bench.training", "--device", "cuda", "--tiny", "--seconds-budget", "3600", "--out", str(tmp_path)
    )
    rows = json.loads((tmp_path / "training.json").read_text())["rows"]
    told = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert rows == list({row["what"]: row for row in told}.values())
    assert [row for row in rows if row.keys() & {"failed", "skipped"}] == []
    assert [len(runs) for row in rows for runs in row.get("all", {}).values()] == [2] * 4


def test_a_training_bench_keeps_what_it_measured_before_its_time_was_up_or_it_failed(tmp_path: Path) -> None:
    def measure(seconds: float, report: Report) -> Iterator[dict[str, Any]]:
        yield {"runs": 1}
        report.ends_at -= seconds
        yield {"runs": 2}
        raise OSError("no GPU any more")

    for seconds, found in ((0, {"runs": 2, "failed": "OSError: no GPU any more"}), (1000, {"runs": 2})):
        report = Report(tmp_path, 500)
        report.attempt("a part", 10, partial(measure, seconds, report))
        report.attempt("a long part", 1000, lambda: [])
        [first, last] = json.loads((tmp_path / "training.json").read_text())["rows"]
        assert first.items() >= found.items()
        assert ("failed" in first, "skipped" in last) == ("failed" in found, True)
