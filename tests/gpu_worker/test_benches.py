"""The programs that measure the engine still run: nothing else uses it as they do, and they are seldom started."""

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.bench import batching, training
from tests.bench.gpu import child
from tests.bench.training import Report

pytestmark = pytest.mark.slow


def test_what_sharing_steps_gains_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(batching, "CASES", batching.CASES[1:2])
    monkeypatch.setattr(sys, "argv", ["batching", "--steps", "2", "--repeats", "1", "--arrivals", "4"])
    batching.main()
    printed = capsys.readouterr().out
    for row in ("64x64", "in the engine", "UniPC"):
        assert row in printed


def test_the_command_for_a_gpu_starts_a_section_and_leaves_its_figures(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.bench.gpu", "--tiny", "--out", str(tmp_path), "--section", "memory"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_whole(tmp_path / "memory.json")
    assert "memory: done after" in done.stdout


def test_a_section_for_a_gpu_runs_with_tiny_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("600\n"))
    assert child.run("sd15", tmp_path, tiny=True) == 0
    assert_whole(tmp_path / "sd15.json")


def assert_whole(path: Path) -> None:
    """Each part of a section has its figures."""
    found = json.loads(path.read_text())
    assert found["error"] == ""
    assert found["rows"]
    assert [row for row in found["rows"] if row.keys() & {"failed", "skipped"}] == []


def test_every_part_of_the_training_bench_for_a_gpu_runs_with_tiny_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--device", "cuda", "--tiny", "--seconds-budget", "3600", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["training", *options])
    training.main()
    printed = capsys.readouterr().out
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
