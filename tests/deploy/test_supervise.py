"""Supervision with stand-in programs: what dies comes back, and nothing outlives the launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.processes import ROOT

pytestmark = pytest.mark.slow

LAUNCHER = """
import json, os, sys
from pathlib import Path
from deploy.local.plan import Program
from deploy.local.supervise import Supervision
from services.common.process import bound
folder = Path(sys.argv[1])
states = {}
def on_state(name, word, pid):
    states[name] = [word, pid]
    (folder / "new").write_text(json.dumps(states))
    (folder / "new").rename(folder / "states")
sh = lambda script: bound(["sh", "-c", script])
Supervision([
    Program("store", sh("echo hello; exec sleep 1000")),
    Program("first", sh("sleep 0.3; echo bootstrapped"), once=True),
    Program("service", bound([sys.executable, "-c", sys.argv[2]]), stage=2),
    Program("crashes", sh("echo no; exit 3"), stage=2),
], folder, on_state).run_until_stopped()
"""
# A service with a worker that has a session of its own, as the endpoints service starts them.
SERVICE = """
import os, subprocess, sys, time
os.environ["ESD_LAUNCHER_PID"] = str(os.getppid())
code = "from services.common.process import die_with_launcher as d; d(); import time; "
code += "print('worker up', flush=True); time.sleep(1000)"
subprocess.Popen([sys.executable, "-c", code], start_new_session=True).wait()
"""


def wait_for(condition: Callable[[], Any], seconds: float = 180) -> Any:
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.02)
    return result


class Launcher:
    """A launcher of stand-ins, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        with self.log.open("wb") as log:
            command = [sys.executable, "-W", "error", "-c", LAUNCHER, str(folder), SERVICE]
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)

    def states(self) -> dict[str, tuple[str, int | None]]:
        file = self.folder / "states"
        return json.loads(file.read_text()) if file.exists() else {}

    def running(self, name: str) -> int | None:
        state, pid = self.states().get(name, ("", None))
        return pid if state == "RUNNING" else None

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path)
    wait_for(lambda: launcher.running("service") and "worker up" in launcher.log.read_text())
    yield launcher
    if launcher.process.poll() is None:
        launcher.process.kill()
        launcher.process.wait()


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [each for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


def test_every_line_of_the_log_has_a_name(launcher: Launcher) -> None:
    wait_for(lambda: "crashes    | no" in launcher.log.read_text())
    lines = launcher.log.read_text().splitlines()
    assert "store      | hello" in lines
    assert lines.index("first      | bootstrapped") < lines.index("service    | worker up")
    assert all(line[10:13] == " | " for line in lines), lines


def test_what_is_killed_comes_back(launcher: Launcher) -> None:
    pid = wait_for(lambda: launcher.running("store"))
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: launcher.running("store") not in {None, pid})


def test_what_fails_at_once_is_tried_again(launcher: Launcher) -> None:
    wait_for(lambda: launcher.log.read_text().count("crashes    | no") >= 3)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_everything(launcher: Launcher, signum: signal.Signals) -> None:
    descendants = launcher.descendants()
    assert len(descendants) >= 3  # store, service, worker
    launcher.process.send_signal(signum)
    assert launcher.process.wait(timeout=120) == 0
    assert alive(descendants) == []


def test_nothing_survives_a_launcher_that_is_killed(launcher: Launcher) -> None:
    descendants = launcher.descendants()
    assert len(descendants) >= 3
    launcher.process.kill()
    launcher.process.wait()
    wait_for(lambda: not alive(descendants))


def test_a_worker_outlives_the_service_that_started_it(launcher: Launcher) -> None:
    pid = wait_for(lambda: launcher.running("service"))
    (worker,) = psutil.Process(pid).children()
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: launcher.running("service") not in {None, pid})
    assert alive([worker]) == [worker]
    launcher.process.terminate()
    assert launcher.process.wait(timeout=120) == 0
    assert alive([worker]) == []
