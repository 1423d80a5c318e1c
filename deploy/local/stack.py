"""Owns a running stack: the launcher's side (`run`) and the handle for others (`Stack`).

The state of a stack stands in ESD_HOME/run/stack.json, written anew at each change.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

import certifi

from deploy.local.home import CannotRunError, Home, run_folder
from deploy.local.plan import Options, Plan, make_plan
from deploy.local.postgres import Postgres
from deploy.local.store import reserve
from gateway.settings import GatewaySettings, refuse_open_door, refuse_unusable_certificate
from services.common.process import bound
from services.common.settings import load

ROOT = Path(__file__).resolve().parents[2]
_LOG_LINES = 40


class AlreadyRunningError(CannotRunError):
    """A stack runs on this home; the message says which."""


class StackFailedError(RuntimeError):
    """The stack did not get ready; the message has the end of its log."""


@dataclass
class ProcessState:
    """One process as `esd status` shows it. `state` is supervisor's word: STARTING, RUNNING, BACKOFF, EXITED, …"""

    port: int | None = None
    pid: int | None = None
    state: str = "STOPPED"


@dataclass
class State:
    """What ESD_HOME/run/stack.json holds."""

    pid: int
    url: str
    webui_url: str | None
    probe_url: str
    api_key_file: str
    ready: bool = False
    reserve: str = "0"  # of the object store; one that older versions do not tell
    processes: dict[str, ProcessState] = field(default_factory=dict)

    def save(self, file: Path) -> None:
        """Replaces the file at once, so that readers never see half of it."""
        part = file.with_suffix(".new")
        part.write_text(json.dumps(asdict(self), indent=2))
        part.rename(file)


def read_state(home: Path) -> State | None:
    """Returns the state of the stack that runs on this home, None if there is none."""
    try:
        with (home / "run" / "lock").open() as lock:
            if _try_lock(lock, fcntl.LOCK_SH):
                return None  # nobody holds it: the file is of a stack that was killed
        values = json.loads((home / "run" / "stack.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    processes = {name: ProcessState(**process) for name, process in values.pop("processes").items()}
    return State(**values, processes=processes)


def run(options: Options) -> None:
    """Runs the stack in this process until TERM or INT.

    Raises:
        CannotRunError: it cannot start.
    """
    from deploy.local.supervise import Supervision  # only the launcher pays for it

    with ExitStack() as stack:
        try:
            lock = stack.enter_context((run_folder(options.home) / "lock").open("a"))
            if not _lock(lock):
                state = read_state(options.home)
                where = f" (pid {state.pid}, {state.url})" if state else ""
                raise AlreadyRunningError(f"the stack of {options.home.resolve()} is running already{where}")
            file = run_folder(options.home) / "stack.json"
            file.unlink(missing_ok=True)  # of a stack that was killed
            home = Home(options.home)
            plan = make_plan(options, home)
            _check_settings(plan)
            _save_trust(home)
            Postgres(home, plan.ports["postgres"]).prepare()
            state = _new_state(plan, home)
            state.save(file)
        except OSError as error:  # read-only, no folder, no room on the disk
            raise CannotRunError(f"ESD_HOME={options.home}: {error.strerror} ({error.filename})") from error
        is_saved = True

        def on_state(name: str, word: str, pid: int | None) -> None:
            nonlocal is_saved
            if name == "ready" and word == "EXITED" and not state.ready:
                state.ready = True
                webui = f", webui {plan.webui_url}" if plan.webui_url else ""
                supervision.say(f"ready: {plan.url}{webui} - the first API key is in {home.api_key_file}")
            if name in state.processes:
                state.processes[name].state, state.processes[name].pid = word, pid
            try:
                state.save(file)
                is_saved = True
            except OSError as error:  # such as a full disk, which the stack outlives
                if is_saved:
                    supervision.say(f"{file} cannot be written, so `esd status` shows old states: {error.strerror}")
                is_saved = False

        supervision = Supervision(plan.programs, home.run, on_state)
        supervision.say(f"starting in {home.path}")
        try:
            supervision.run_until_stopped()
        finally:
            file.unlink(missing_ok=True)
        supervision.say("stopped")


def _check_settings(plan: Plan) -> None:
    """Has the gateway's settings judged here, so that a wrong one ends the start at once."""
    os.environ.update(next(program.environment for program in plan.programs if program.name == "gateway"))
    settings = load(GatewaySettings)
    refuse_open_door(settings)
    refuse_unusable_certificate(settings)


def _save_trust(home: Home) -> None:
    """Has this machine's workers trust the gateway's certificate, which may be a self-made one, beside the usual."""
    if certificate := os.environ.get("ESD_TLS_CERT_FILE"):
        usual = os.environ.get("SSL_CERT_FILE") or certifi.where()
        home.trust_file.write_text(Path(usual).read_text() + "\n" + Path(certificate).read_text())


def _new_state(plan: Plan, home: Home) -> State:
    processes = {program.name: ProcessState(program.port) for program in plan.programs if not program.once}
    key_file = str(home.api_key_file)
    return State(
        os.getpid(), plan.url, plan.webui_url, plan.probe_url, key_file, reserve=reserve(), processes=processes
    )


def _lock(file: IO[str]) -> bool:
    """Takes the lock for good. Tries for a second, since whoever reads the state holds it for a moment."""
    end = time.monotonic() + 1
    while not _try_lock(file, fcntl.LOCK_EX):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _try_lock(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Stack:
    """A stack in a process of its own, for the demo, tests and benchmarks. It ends when this process does.

    `listen` with port 0 takes a free port, as `webui` does for the second listener; `env_overrides` are ESD_* settings
    on top of this process's own.
    """

    def __init__(
        self,
        home: Path,
        listen: str = "127.0.0.1:0",
        webui: bool = False,
        replicas: int = 1,
        env_overrides: dict[str, str] | None = None,
    ) -> None:
        self.home = home.resolve()
        self._arguments = ["--home", str(self.home), "--listen", listen]
        if webui:
            self._arguments += ["--webui-port", "0"]
        if replicas > 1:
            self._arguments += ["--replicas", str(replicas)]
        self._environment = {**os.environ, **(env_overrides or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._state: State | None = None

    @property
    def url(self) -> str:
        """The gateway's address."""
        return self._started().url

    @property
    def webui_url(self) -> str:
        """The address of the second listener."""
        url = self._started().webui_url
        assert url is not None, "started without a webui port"
        return url

    @property
    def api_key(self) -> str:
        """The first API key."""
        return Path(self._started().api_key_file).read_text()

    @property
    def log_file(self) -> Path:
        """What the stack has printed."""
        return self.home / "stack.log"

    @property
    def launcher_pid(self) -> int:
        """The launcher's process."""
        return self._started().pid

    def start(self, timeout_seconds: float = 300) -> None:
        """Starts and returns when everything answers. Raises StackFailedError with the end of the log."""
        run_folder(self.home)
        command = [sys.executable, "-m", "deploy.local.cli", "up", *self._arguments]
        with os.fdopen(os.open(self.log_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as log:
            self._process = subprocess.Popen(
                bound(command, signum=signal.SIGTERM),
                cwd=ROOT,
                env=self._environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        end = time.monotonic() + timeout_seconds
        while True:
            state = read_state(self.home)
            if state is not None and state.ready and state.pid == self._process.pid:
                self._state = state
                return
            if self._process.poll() is not None or time.monotonic() > end:
                self.stop()
                raise StackFailedError(f"the stack did not get ready; the end of {self.log_file}:\n{self._log_end()}")
            time.sleep(0.05)  # the state is a file of another process

    def stop(self) -> None:
        """Stops everything and returns when nothing is left."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None

    def ports(self) -> dict[str, int]:
        """Returns name → port of the processes that listen on one."""
        return {name: process.port for name, process in self._started().processes.items() if process.port is not None}

    def processes(self) -> dict[str, int]:
        """Returns name → pid of the processes that run now, the launcher (`launcher_pid`) and workers left out."""
        state = read_state(self.home)
        if state is None:
            return {}
        return {name: process.pid for name, process in state.processes.items() if process.pid is not None}

    def __enter__(self) -> Stack:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _started(self) -> State:
        assert self._state is not None, "start() comes first"
        return self._state

    def _log_end(self) -> str:
        return "\n".join(self.log_file.read_text(errors="replace").splitlines()[-_LOG_LINES:])
