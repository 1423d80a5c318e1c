"""Owns the processes that rows name, our children or not: handles that tell when one ends, without polling."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from functools import cache
from pathlib import Path
from typing import Protocol, TypeVar

import structlog

from services.common import process as bonds

log = structlog.get_logger()

_FIRST_PAUSE_SECONDS = 0.5  # doubled at each further failure
# The shell waits for a line before it becomes the command: by then the pid is in the database. If this service dies
# between the two, the shell reads the end of the pipe and goes, so that nothing ever runs that no row knows.
_GATE = 'read -r go && exec "$@"'
# Where it matters how the command ended, the shell stays, hands SIGTERM on, and writes the exit code into the file that
# is its $0: who adopts a process cannot ask for it. If the shell is killed, the command is too (die_with_parent).
# A command that was asked to end was interrupted, also where that SIGTERM killed it, or the SIGKILL of who waits no
# longer. So that is written as soon as it is asked, and only an exit code of its own takes the place.
_RECORDING_GATE = """
read -r go || exit
exec 3>&2 2>/dev/null  # the shell's own remarks are not the command's last words
interrupted=$1 python=$2 wrapper=$3; shift 3
record() { echo $1 >"$0.new" && mv "$0.new" "$0"; }
trap 'asked=1; record $interrupted; ${child:+kill -TERM $child}' TERM
"$python" -I -S "$wrapper" --parent $$ -- "$@" 2>&3 3>&- & child=$!
while wait $child; code=$?; kill -0 $child; do :; done
trap '' TERM
[ "$asked" ] && [ $code -gt 128 ] || record $code
"""


class Process:
    """A running process. `on_end` is called once it has ended.

    A pidfd stands for this very process, whatever happens to its number (pidfd_open(2)).
    """

    def __init__(self, pid: int, pidfd: int, start_time: str, on_end: Callable[[], None]) -> None:
        self.pid = pid
        self.start_time = start_time
        self.has_ended = False
        self.is_stopping = False
        self.was_killed = False  # because it did not end in time
        self.exit: int | None = None  # the status, minus the signal that killed it, None where it was not our child
        self._pidfd = pidfd
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._kill: asyncio.TimerHandle | None = None
        self._loop.add_reader(pidfd, self._ended)

    @classmethod
    def adopt(cls, pid: int, start_time: str, on_end: Callable[[], None]) -> Process | None:
        """The process that had this pid at that start time, or None if it has ended."""
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return None
        if start_time_of(pid) != start_time:
            os.close(pidfd)
            return None
        return cls(pid, pidfd, start_time, on_end)

    def stop(self, seconds: float) -> None:
        """Asks the process to end, and kills it if it has not after so many seconds; once."""
        if not self.is_stopping and not self.has_ended:
            self.is_stopping = True
            self._send(signal.SIGTERM)
            self._kill = self._loop.call_later(seconds, self._shoot)

    def let_go(self) -> None:
        """Watches no longer; the process runs on."""
        if self._kill:
            self._kill.cancel()
        if not self.has_ended:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self.has_ended = True

    def _shoot(self) -> None:
        self.was_killed = True
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            return  # it has ended, and the loop is about to be told

    def _ended(self) -> None:
        try:
            result = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
            if result is not None:
                self.exit = result.si_status if result.si_code == os.CLD_EXITED else -result.si_status
        except ChildProcessError:
            self.exit = None  # adopted: its parent learns the status
        self.let_go()
        self._on_end()


class Row(Protocol):
    """A row with the process that was last started for it; `pid` is None where there is none. `key` outlasts it."""

    pid: int | None
    start_time: str | None

    @property
    def key(self) -> str: ...


R = TypeVar("R", bound=Row)


class Processes:
    """The processes of rows. `on_change` is called when one has ended, or when a pause has."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change
        self._one_ended = asyncio.Event()
        self._watched: dict[str, Process] = {}
        self._pausing: set[str] = set()

    def find(self, row: Row) -> Process | None:
        """The row's process, adopted if it is not watched yet; one that has ended since is found once.

        None where there is none, or it ended while nobody watched.
        """
        process = self._watched.pop(row.key, None)
        if process is not None and (process.pid, process.start_time) != (row.pid, row.start_time):
            process.let_go()  # another control loop has replaced it meanwhile
            process = None
        if process is None and row.pid is not None and row.start_time is not None:
            process = Process.adopt(row.pid, row.start_time, self._ended)
            if process is not None:
                log.info("a process is adopted", key=row.key, pid=process.pid)
        if process is not None and not process.has_ended:
            self._watched[row.key] = process
        return process

    async def start(
        self,
        row: R,
        claim: Callable[[R], Awaitable[bool]],
        command: list[str],
        environment: dict[str, str],
        log_file: Path,
        exit_file: Path | None = None,
    ) -> Process | None:
        """Starts the row's next process, in a session of its own; it becomes the command once `claim` wrote the row.

        None: `claim` said no, since another control loop was faster; the process ends without having run the command.
        Its output is appended to the log file, which begins anew and may be shortened meanwhile. With an `exit_file`,
        the command's exit code is there once the process has ended: EXIT_INTERRUPTED if a signal ended it after it was
        asked to end, nothing if it was killed unasked.
        """
        shell = ["/bin/sh", "-c", _GATE, "worker", *command]
        if exit_file is not None:
            shell = ["/bin/sh", "-c", _RECORDING_GATE, str(exit_file), str(bonds.EXIT_INTERRUPTED)]
            shell += [sys.executable, bonds.__file__, *command]
        gate_out, gate_in = os.pipe()
        try:
            process = self._spawn(shell, gate_out, environment, log_file)
            row.pid, row.start_time = process.pid, process.start_time
            if not await claim(row):
                return None
            self._watched[row.key] = process
            os.write(gate_in, b"go\n")
            return process
        finally:
            os.close(gate_in)
            os.close(gate_out)

    def pause(self, key: str, num_failures: int) -> None:
        """Begins a pause before the next process of a row, the longer the more often one has failed."""
        self._pausing.add(key)
        delay = _FIRST_PAUSE_SECONDS * 2 ** max(0, num_failures - 1)
        asyncio.get_running_loop().call_later(delay, self._end_pause, key)

    def is_pausing(self, key: str) -> bool:
        """Whether no process is to be started yet."""
        return key in self._pausing

    async def end(self, seconds: float) -> None:
        """Asks all processes to end, kills those that have not after so many seconds, and returns when none is left."""
        for process in self._watched.values():
            process.stop(seconds)
        while any(not process.has_ended for process in self._watched.values()):
            self._one_ended.clear()
            await self._one_ended.wait()

    def close(self) -> None:
        """Lets go of all processes, which run on."""
        for process in self._watched.values():
            process.let_go()
        self._watched.clear()

    def _spawn(self, command: list[str], stdin: int, environment: dict[str, str], log_file: Path) -> Process:
        log_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        log_file.write_bytes(b"")
        with log_file.open("ab") as output:
            child = subprocess.Popen(
                command, env=environment, stdin=stdin, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        child.returncode = 0  # keeps Popen from waiting for the process: the handle does
        return Process(child.pid, os.pidfd_open(child.pid), start_time_of(child.pid), self._ended)

    def _ended(self) -> None:
        self._one_ended.set()
        self._on_change()

    def _end_pause(self, key: str) -> None:
        self._pausing.discard(key)
        self._on_change()


def start_time_of(pid: int) -> str:
    """When the process started, as no other process with this pid has it, also after a reboot; "" if it is gone."""
    try:
        # proc_pid_stat(5): the 22nd field is the start time in ticks since boot; the 2nd, in brackets, may hold spaces.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] in "ZX" else f"{_boot_id()}/{fields[19]}"


@cache
def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
