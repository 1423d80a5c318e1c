"""The programs that measure the engine still run: nothing else uses it as they do, and they are seldom started."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
