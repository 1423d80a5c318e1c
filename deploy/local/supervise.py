"""Owns the supervision: supervisor's own loop, in this process, with one log and no control port.

Of supervisor we use the part that starts, watches, restarts and stops processes. Its log files, HTTP server and
configuration language stay unused: programs come from `Program` values, lines of output go to one stream with the name
in front, and states go to a callback.

Chosen over circus, which polls for deaths, opens unauthenticated ZeroMQ sockets and did not stop when asked to at once.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
from supervisor import events, loggers
from supervisor.medusa.asyncore_25 import ExitNow
from supervisor.options import ServerOptions
from supervisor.states import ProcessStates, getProcessStateDescription
from supervisor.supervisord import Supervisor

from deploy.local.home import CannotRunError
from deploy.local.plan import Program
from services.common.process import EXIT_WRONG_SETTING, adopt_orphans

ROOT = Path(__file__).resolve().parents[2]
_QUICK_SECONDS = 10  # what dies sooner is started again after a pause, which doubles each time
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 30.0
_STOP_SECONDS = 15  # for each process, before it is killed; longer than the gateway's ESD_STOP_SECONDS
_ORPHAN_SECONDS = 5  # for workers and trainers, which outlive the endpoints service; to be killed costs no attempt
_NAME_WIDTH = 10

OnState = Callable[[str, str, int | None], None]  # name, supervisor's word for the state, pid


class ProgramFailedError(CannotRunError):
    """A program cannot run with the settings that it has; the message names it and has its last line."""


class Supervision(Supervisor):  # type: ignore[misc]
    """Runs the programs in order of their stages: a stage starts when the one-time programs of the last have ended.

    What dies comes back, for ever. Only while the stages start, who says that a setting is wrong ends everything.
    """

    def __init__(self, programs: Iterable[Program], folder: Path, on_state: OnState) -> None:
        self._programs = {program.name: program for program in programs}
        self._on_state = on_state
        self._partial: dict[str, bytes] = {}
        self._last_lines: dict[str, str] = {}
        self._pauses: dict[str, float] = {}
        self._starting = {program.name for program in self._programs.values() if program.once}
        self._failure: str | None = None
        self._survives_hangup = False
        super().__init__(self._options(folder))
        self._wake_reader, self._wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._stage = 0

    def run_until_stopped(self) -> None:
        """Returns when a signal (TERM, INT, HUP) or `stop` has ended everything, descendants of descendants included.

        Raises:
            ProgramFailedError: a setting was wrong, and everything has ended.
        """
        adopt_orphans()
        self._survives_hangup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        try:
            with contextlib.suppress(ExitNow):  # how supervisor says that all have stopped
                self.main()
        finally:
            signal.set_wakeup_fd(-1)
            self._stop_orphans()
        if self._failure is not None:
            raise ProgramFailedError(self._failure)

    def stop(self) -> None:
        """Stops everything, in reverse order of the stages."""
        os.kill(os.getpid(), signal.SIGTERM)

    def say(self, text: str, name: str = "esd") -> None:
        """Writes a line of the one log. Should it have no room, or no reader any more, everything goes on without."""
        try:
            print(f"{name:<{_NAME_WIDTH}} | {text}", flush=True)
        except OSError as error:
            if error.errno in {errno.EIO, errno.EPIPE}:  # the terminal or the pipe's reader has gone for good
                with open(os.devnull, "w") as nowhere:
                    os.dup2(nowhere.fileno(), sys.stdout.fileno())

    def runforever(self) -> None:
        """The loop. (supervisor's hook: called after it has set its signal handlers.)"""
        if self._survives_hangup:  # nohup, which supervisor's handler would undo
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        # Without this a death would be noticed at the next second only: Python goes on polling after a signal.
        signal.set_wakeup_fd(self._wake_writer, warn_on_full_buffer=False)
        self.options.get_socket_map()[self._wake_reader] = _Waker(self._wake_reader)
        events.subscribe(events.ProcessLogEvent, self._on_output)
        events.subscribe(events.ProcessStateEvent, self._on_change)
        self._start_stage(1)
        super().runforever()

    def _options(self, folder: Path) -> Any:
        """supervisor's options, from a configuration without any value of ours, which are set on the objects."""
        file = folder / "supervisor.conf"
        lines = ["[supervisord]", "nodaemon=true", "logfile=/dev/null", "logfile_maxbytes=0"]
        for program in self._programs.values():
            lines += [f"[program:{program.name}]", "command=true", "autostart=false", "redirect_stderr=true"]
            # Whether and when something starts again is decided in _start_again.
            lines += ["autorestart=false", "startsecs=0", f"startretries={2**30}"]
            lines += ["stdout_logfile=NONE", "stdout_events_enabled=true"]
            lines += [f"stopsignal={program.stop_signal}", f"stopwaitsecs={_STOP_SECONDS}", f"priority={program.stage}"]
        for stage in {program.stage for program in self._programs.values()}:
            names = [program.name for program in self._programs.values() if program.stage == stage]
            lines += [f"[group:stage{stage}]", f"programs={','.join(names)}", f"priority={stage}"]
        file.write_text("\n".join(lines) + "\n")
        options = ServerOptions()
        options.realize(["-c", str(file)])
        options.first, options.test = True, False
        options.pidfile = str(folder / "supervisor.pid")
        options.uid = os.getuid()
        options.make_logger = lambda: setattr(options, "logger", _Log(self.say))
        for group in options.process_group_configs:
            for config in group.process_configs:
                program = self._programs[config.name]
                config.command = shlex.join(program.command)
                config.environment = program.environment
                config.directory = str(ROOT)
        return options

    def _start_stage(self, stage: int) -> None:
        self._stage = stage
        for process in self._processes():
            if self._programs[process.config.name].stage == stage:
                process.config.autostart = True
        self._wake()

    def _on_change(self, event: Any) -> None:
        process = event.process
        name, program = process.config.name, self._programs[process.config.name]
        pid = process.pid or None
        ended = program.once and process.state == ProcessStates.EXITED and event.expected
        if process.state in {ProcessStates.EXITED, ProcessStates.BACKOFF} and not ended:
            self._start_again(process)
        over = process.state in {ProcessStates.EXITED, ProcessStates.BACKOFF, ProcessStates.STOPPED}
        self._on_state(name, getProcessStateDescription(process.state), None if over else pid)
        if ended:
            self._starting.discard(name)
            self._next_stage()
        self._wake()

    def _start_again(self, process: Any) -> None:
        """Has supervisor start what died once more, unless it says during the start that a setting is wrong."""
        name = process.config.name
        if self._starting and process.exitstatus == EXIT_WRONG_SETTING and self._failure is None:
            self._failure = f"{name}: {self._last_lines.get(name, 'a setting is wrong')}"
            self.stop()
        now = time.time()
        self._pauses[name] = pause_after(now - process.laststart, self._pauses.get(name, 0.0))
        process.state, process.delay = ProcessStates.BACKOFF, now + self._pauses[name]
        process.backoff = math.ceil(self._pauses[name])  # a delay beyond it would count as a clock that was set back

    def _next_stage(self) -> None:
        """Starts the next stages up to one that ends with a one-time program that has not ended yet."""
        stages = {program.stage for program in self._programs.values()}
        while self._stage + 1 in stages:
            self._start_stage(self._stage + 1)
            if any(program.once for program in self._programs.values() if program.stage == self._stage):
                return

    def _on_output(self, event: Any) -> None:
        name = event.process.config.name
        *lines, rest = (self._partial.pop(name, b"") + event.data).split(b"\n")
        if rest:
            self._partial[name] = rest
        for line in lines:
            self._last_lines[name] = line.decode(errors="replace")
            self.say(self._last_lines[name], name)

    def _processes(self) -> list[Any]:
        return [process for group in self.process_groups.values() for process in group.processes.values()]

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # then the pipe is full of reasons to wake up
            os.write(self._wake_writer, b".")

    def _stop_orphans(self) -> None:
        """Ends what the services have left: workers, which outlive the endpoints service by design."""
        orphans = psutil.Process().children(recursive=True)
        for orphan in orphans:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended by itself
                orphan.terminate()
        for orphan in psutil.wait_procs(orphans, timeout=_ORPHAN_SECONDS)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                orphan.kill()
        psutil.wait_procs(orphans, timeout=_ORPHAN_SECONDS)


def pause_after(lived_seconds: float, last_pause_seconds: float) -> float:
    """Seconds until what died starts again: none if it has lived for a while, else twice as many as the last time."""
    if lived_seconds >= _QUICK_SECONDS:
        return 0.0
    return min(max(2 * last_pause_seconds, _FIRST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS)


class _Waker:
    """Ends supervisor's poll when there is a byte in the pipe."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def handle_read_event(self) -> None:
        os.read(self._fd, 65536)

    def handle_error(self) -> None:
        raise  # noqa: PLE0704 - called by supervisor while it handles the error


class _Log(loggers.Logger):  # type: ignore[misc]
    """supervisor's own messages in our log, from warnings up."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(loggers.LevelsByName.WARN)
        self._say = say

    def log(self, level: int, msg: str, **kw: object) -> None:
        """One message."""
        self._say(msg % kw if kw else msg)


if sys.platform != "linux":
    raise SystemExit("the one-machine stack needs Linux")
