"""The proof in short: `make chaos` is the long one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.processes import ROOT


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_job_is_lost_or_doubled_while_everything_is_killed() -> None:
    command = [sys.executable, "-m", "tests.chaos", "--jobs", "60", "--kills", "10"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
