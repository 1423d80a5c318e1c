"""The launcher as its user meets it: what it says when something is wrong, and that it leaves nothing behind."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import httpx
import psutil
import pytest

from deploy.local.cli import _workers
from deploy.local.home import run_folder
from deploy.local.plan import Options, PortRefusedError
from deploy.local.stack import AlreadyRunningError, Stack, State, read_state, run
from tests.processes import ROOT

NAMES = {"postgres", "swift", "identity", "models", "endpoints", "inference", "training", "gateway"}
# A proxy that does not answer, one that httpx cannot use, and what no PostgreSQL of ours could satisfy.
HOSTILE = {"http_proxy": "http://127.0.0.1:1", "all_proxy": "socks5://127.0.0.1:1", "PGSSLMODE": "verify-full"}


def esd(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy.local.cli", *map(str, arguments)]
    variables = {**os.environ, "COLUMNS": "200", **environment}
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120, check=False)


def wait_for(condition: Callable[[], object], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    # A long path, since sockets' paths end at 107 bytes, with what has a meaning in configuration files.
    with tempfile.TemporaryDirectory(prefix="esd-stack-") as folder:
        Path(folder).chmod(0o711)
        yield Path(folder) / ("long % " * 15)


@pytest.fixture(scope="module")
def stack(home: Path) -> Iterator[Stack]:
    with Stack(home, webui=True, env_overrides=HOSTILE) as stack:
        yield stack


@pytest.mark.slow
def test_the_ready_stack_answers_its_first_key_on_both_ports(stack: Stack) -> None:
    for url in (stack.url, stack.webui_url):
        assert httpx.get(f"{url}/ping", headers={"x-api-key": stack.api_key}).status_code == 200
        assert httpx.get(f"{url}/ping", headers={"x-api-key": "esd_wrong"}).status_code == 403


@pytest.mark.slow
def test_no_secret_is_printed(stack: Stack) -> None:
    log = stack.log_file.read_text()
    for file in (stack.home / "secrets").iterdir():
        # Line by line, as the log has them: each has the name of its program in front.
        lines = [line for line in file.read_text().splitlines() if not line.startswith("-----")]
        assert lines
        assert not [line for line in lines if line in log], file


@pytest.mark.slow
def test_everything_listens_on_this_machine_only(stack: Stack) -> None:
    listening = set()
    for pid in [stack.launcher_pid, *stack.processes().values()]:
        connections = psutil.Process(pid).net_connections("inet")
        listening |= {
            each.laddr.ip.removeprefix("::ffff:") for each in connections if each.status == psutil.CONN_LISTEN
        }
    assert listening == {"127.0.0.1"}


@pytest.mark.slow
def test_status_shows_each_process_and_its_health(stack: Stack) -> None:
    shown = esd("status", "--home", stack.home, **HOSTILE)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "no upload is taken" not in shown.stdout
    for name, pid in stack.processes().items():
        assert re.search(rf"{name} .*{pid} .*RUNNING .*ok", shown.stdout), shown.stdout


def test_status_tells_workers_from_trainers_and_leaves_out_the_shells_around_them(tmp_path: Path) -> None:
    (tmp_path / "gpu_worker.py").write_text("print('here', flush=True); import time; time.sleep(600)")
    started = []
    for command in (
        [sys.executable, "-m", "gpu_worker"],
        ["sh", "-c", '"$@"; :', "sh", sys.executable, "-m", "gpu_worker", "train"],
    ):
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
    worker, shell = started
    [trainer] = psutil.Process(shell.pid).children()
    try:
        found = [(name, pid) for name, pid in _workers(os.getpid()) if pid in {worker.pid, shell.pid, trainer.pid}]
        assert sorted(found) == [("trainer", trainer.pid), ("worker", worker.pid)]
    finally:
        trainer.kill()
        worker.kill()
        for process in started:
            process.communicate()


@pytest.mark.slow
def test_a_second_start_on_the_same_home_says_so(stack: Stack) -> None:
    second = esd("up", "--home", stack.home, "--listen", "127.0.0.1:0")
    assert second.returncode == 1
    assert f"is running already (pid {stack.launcher_pid}, {stack.url})" in second.stderr


@pytest.mark.slow
def test_a_state_that_cannot_be_written_stops_nothing(stack: Stack) -> None:
    """As on a full disk."""

    def kill() -> None:
        pid = psutil.Process(stack.launcher_pid).children()[0].pid
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not psutil.pid_exists(pid))

    obstacle = stack.home / "run" / "stack.new"
    obstacle.mkdir()
    kill()
    wait_for(lambda: "stack.json cannot be written" in stack.log_file.read_text())
    kill()
    obstacle.rmdir()
    kill()
    children = psutil.Process(stack.launcher_pid).children
    wait_for(lambda: set(stack.processes().values()) == {child.pid for child in children()})
    assert stack.log_file.read_text().count("cannot be written") == 1


def test_the_state_of_a_stack_that_was_killed_is_forgotten_before_anything_is_started(tmp_path: Path) -> None:
    file = run_folder(tmp_path) / "stack.json"
    file.write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(PortRefusedError):
        run(Options(tmp_path, f"127.0.0.1:{taken.getsockname()[1]}"))
    assert not file.exists()


def test_two_who_read_the_state_do_not_take_each_other_for_a_stack(tmp_path: Path) -> None:
    (run_folder(tmp_path) / "stack.json").write_text("{}")
    with (run_folder(tmp_path) / "lock").open("a") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        assert read_state(tmp_path) is None


def test_who_has_not_the_lock_makes_no_secrets(tmp_path: Path) -> None:
    """Two first starts at once would make hashes that belong to the secrets of the other."""
    with (run_folder(tmp_path) / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(AlreadyRunningError, match="is running already"):
            run(Options(tmp_path))
    assert not (tmp_path / "secrets").exists()


def test_a_launcher_that_has_just_ended_has_no_workers() -> None:
    with subprocess.Popen(["true"]) as ended:
        pass
    assert _workers(ended.pid) == []


def test_the_demo_waits_for_a_stack_that_starts_and_says_when_it_has_gone(tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text("esd_key")
    state = State(1, "http://127.0.0.1:1", None, "http://127.0.0.1:1", str(key_file))
    file = run_folder(tmp_path) / "stack.json"
    with (run_folder(tmp_path) / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.mkfifo(file)
        command = [sys.executable, "-m", "deploy.local.cli", "demo", "--home", str(tmp_path)]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as demo:
            with file.open("w") as answer:  # once it asks
                os.mkfifo(tmp_path / "next")
                (tmp_path / "next").replace(file)
                answer.write(json.dumps(asdict(state)))
            with file.open("w") as answer:  # once it asks again
                answer.write(json.dumps(asdict(replace(state, ready=True))))
            _, said = demo.communicate(timeout=120)
    assert demo.returncode == 1
    assert said.startswith("the gateway at http://127.0.0.1:1 does not answer: ")
    assert said.count("\n") == 1


@pytest.mark.slow
def test_a_stack_whose_launcher_is_killed_leaves_nothing_and_starts_again_also_elsewhere_and_on_a_full_disk(
    stack: Stack, home: Path
) -> None:
    """Its home is moved meanwhile, and its first key was revoked."""

    def client(stack: Stack, key: str) -> httpx.Client:
        return httpx.Client(base_url=stack.url, headers={"x-api-key": key}, trust_env=False)

    wait_for(lambda: esd("status", "--home", stack.home).returncode == 0)  # after what other tests have killed
    revoked = stack.api_key
    with client(stack, revoked) as http:
        picture = {"filename": "1.png", "name": "1.png", "type": "image", "params": {}}
        body = {"dataset_name": "kept", "content": [picture], "params": {}}
        url = http.post("/datasets", json=body).json()["data"]["s3PresignUrl"]["1.png"]
        assert http.put(url, content=b"a picture").status_code == 200
        assert http.put("/datasets/kept", json={"status": "Enabled"}).status_code == 200
        (row,) = http.get("/keys").json()["data"]["keys"]
        key = http.post("/keys", json={"username": "api"}).json()["data"]["key"]
        assert http.request("DELETE", "/keys", json={"key_id_list": [row["id"]]}).status_code == 204

    processes = [psutil.Process(pid) for pid in stack.processes().values()]
    assert set(stack.processes()) == NAMES
    os.kill(stack.launcher_pid, signal.SIGKILL)
    wait_for(lambda: not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in processes))
    assert stack.processes() == {}
    stack.stop()

    moved = home.with_name("moved % " * 13)
    home.rename(moved)
    with Stack(moved) as second:
        with client(second, key) as http:
            answer = http.get("/datasets/kept")
            assert answer.status_code == 200, answer.text
            (shown,) = answer.json()["data"]["data"]
            assert http.get(shown["preview_url"]).content == b"a picture"
        assert f"the first API key, in {moved}/secrets/api-key, was revoked" in second.log_file.read_text()
        assert esd("status", "--home", moved).returncode == 0
        assert "it is wrong, revoked or over" in esd("demo", "--home", moved).stderr
        (moved / "secrets" / "api-key").unlink()
        assert esd("status", "--home", moved).returncode == 0

    with Stack(moved, env_overrides={"ESD_SWIFT_RESERVE": "100%"}) as third:
        processes = [psutil.Process(pid) for pid in third.processes().values()]
        assert third.api_key != revoked
        with client(third, third.api_key) as http:
            assert http.get("/ping").status_code == 200
        full = esd("status", "--home", moved)
    assert full.returncode == 1, full.stdout + full.stderr
    assert f"free on the disk of {moved}: no upload is taken, and results wait" in full.stdout
    assert not [each for each in processes if each.is_running()]
    assert esd("status", "--home", moved).returncode == 1


def test_a_home_that_cannot_be_one_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for command in ("up", "status"):
        refused = esd(command, "--home", file)
        assert refused.returncode == 1
        assert str(file) in refused.stderr
        assert "Traceback" not in refused.stderr


def test_a_taken_port_is_named_with_its_setting(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = esd("up", "--home", home / "third", "--listen", f"127.0.0.1:{port}")
    assert refused.returncode == 1
    assert f"port {port} of 127.0.0.1 is in use" in refused.stderr
    assert "ESD_LISTEN" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ESD_LISTEN": "0.0.0.0:0"}, "ESD_TLS_CERT_FILE"),
        ({"ESD_LISTEN": "nonsense"}, "ESD_LISTEN=nonsense"),
        ({"ESD_LISTEN": "127.0.0.1:65536"}, "ESD_LISTEN=127.0.0.1:65536"),
        ({"ESD_BASE_PATH": "prod"}, "setting ESD_BASE_PATH: a value such as /prod is wanted (given: 'prod')"),
        ({"ESD_LOG_LEVEL": "loud"}, "ESD_LOG_LEVEL"),
        ({"ESD_SWIFT_RESERVE": "loads"}, "swift: setting ESD_SWIFT_RESERVE: bytes, or a percentage such as 2%"),
    ],
)
def test_a_wrong_setting_ends_the_start_by_name(home: Path, environment: dict[str, str], said: str) -> None:
    refused = esd("up", "--home", home / "fourth", **{"ESD_LISTEN": "127.0.0.1:0", **environment})
    assert refused.returncode != 0
    assert said in refused.stderr
    assert "Traceback" not in refused.stderr
