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
from typing import IO, Any

import psutil
import pytest

from deploy.local.supervise import pause_after
from tests.processes import ROOT

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
    Program("crashes", sh("echo no; exit 2"), stage=2),
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
    """A launcher of stand-ins, in a process of its own. `stdout` may be another place than its log."""

    def __init__(self, folder: Path, *wrapper: str, stdout: IO[bytes] | int | None = None) -> None:
        self.folder = folder
        self.log = folder / "log"
        with self.log.open("wb") as log:
            command = [*wrapper, sys.executable, "-W", "error", "-c", LAUNCHER, str(folder), SERVICE]
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log if stdout is None else stdout, stderr=log)

    def states(self) -> dict[str, tuple[str, int | None]]:
        file = self.folder / "states"
        return json.loads(file.read_text()) if file.exists() else {}

    def running(self, name: str) -> int | None:
        state, pid = self.states().get(name, ("", None))
        return pid if state == "RUNNING" else None

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def restart_store(self) -> None:
        """Has it notice a death, change a state and write to its log."""
        pid = wait_for(lambda: self.running("store"))
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: self.running("store") not in {None, pid})

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    with Launcher(tmp_path) as launcher:
        wait_for(lambda: launcher.running("service") and "worker up" in launcher.log.read_text())
        yield launcher


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [each for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
def test_every_line_of_the_log_has_a_name(launcher: Launcher) -> None:
    wait_for(lambda: "crashes    | no" in launcher.log.read_text())
    lines = launcher.log.read_text().splitlines()
    assert "store      | hello" in lines
    assert lines.index("first      | bootstrapped") < lines.index("service    | worker up")
    assert all(line[10:13] == " | " for line in lines), lines


@pytest.mark.slow
def test_what_is_killed_comes_back(launcher: Launcher) -> None:
    launcher.restart_store()


@pytest.mark.slow
def test_what_fails_at_once_is_tried_again(launcher: Launcher) -> None:
    wait_for(lambda: launcher.log.read_text().count("crashes    | no") >= 3)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_everything(launcher: Launcher, signum: signal.Signals) -> None:
    descendants = launcher.descendants()
    assert len(descendants) >= 3  # store, service, worker
    launcher.process.send_signal(signum)
    assert launcher.process.wait(timeout=120) == 0
    assert alive(descendants) == []


@pytest.mark.slow
def test_nothing_survives_a_launcher_that_is_killed(launcher: Launcher) -> None:
    descendants = launcher.descendants()
    assert len(descendants) >= 3
    launcher.process.kill()
    launcher.process.wait()
    wait_for(lambda: not alive(descendants))


@pytest.mark.slow
def test_a_worker_outlives_the_service_that_started_it(launcher: Launcher) -> None:
    pid = wait_for(lambda: launcher.running("service"))
    (worker,) = psutil.Process(pid).children()
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: launcher.running("service") not in {None, pid})
    assert alive([worker]) == [worker]
    launcher.process.terminate()
    assert launcher.process.wait(timeout=120) == 0
    assert alive([worker]) == []


@pytest.mark.slow
def test_nohup_outlives_the_terminal(tmp_path: Path) -> None:
    with Launcher(tmp_path, "nohup") as launcher:
        wait_for(lambda: launcher.running("service"))
        launcher.process.send_signal(signal.SIGHUP)
        launcher.restart_store()
        launcher.process.terminate()
        assert launcher.process.wait(timeout=120) == 0
        assert "SIGHUP" not in launcher.log.read_text()


@pytest.mark.slow
def test_a_log_that_nobody_reads_any_more_stops_nothing(tmp_path: Path) -> None:
    with Launcher(tmp_path, stdout=subprocess.PIPE) as launcher:
        assert launcher.process.stdout is not None
        launcher.process.stdout.readline()
        launcher.process.stdout.close()
        launcher.restart_store()
        wait_for(lambda: launcher.running("service"))
        descendants = launcher.descendants()
        launcher.process.terminate()
        assert launcher.process.wait(timeout=120) == 0
        assert alive(descendants) == []
        assert launcher.log.read_text() == ""  # what it says to stderr


@pytest.mark.slow
def test_a_log_on_a_full_disk_stops_nothing(tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full, Launcher(tmp_path, stdout=full) as launcher:
        wait_for(lambda: launcher.running("service"))
        launcher.restart_store()


@pytest.mark.slow
def test_a_wrong_setting_ends_the_start_with_what_its_program_says(tmp_path: Path) -> None:
    programs = """[
        Program("first", sh("sleep 1000"), once=True),
        Program("wrong", sh("echo setting ESD_X: no number; exit 2")),
    ]"""
    head, _, _ = LAUNCHER.partition("Supervision([")
    code = f"{head}Supervision({programs}, folder, on_state).run_until_stopped()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 1
    assert ended.stderr.endswith("ProgramFailedError: wrong: setting ESD_X: no number\n")


def test_pauses_double_for_what_dies_young_and_end_with_a_longer_life() -> None:
    pauses = [0.0]
    for lived in (0.1, 0.1, 9.0, 0.1, 0.1, 0.1, 0.1, 0.1, 10.0, 0.1):
        pauses.append(pause_after(lived, pauses[-1]))
    assert pauses[1:] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 0.0, 0.5]
