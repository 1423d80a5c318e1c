"""Owns a handle on a process that may or may not be our child: it tells when the process ends, without polling."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

from services.common import process as bonds

# The shell waits for a line before it becomes the command: by then the pid is in the database. If this service dies
# between the two, the shell reads the end of the pipe and goes, so that nothing ever runs that no row knows.
_GATE = 'read -r go && exec "$@"'
# Where it matters how the command ended, the shell stays, hands SIGTERM on, and writes the exit code into the file that
# is its $0: who adopts a process cannot ask for it. If the shell is killed, the command is too (die_with_parent).
_RECORDING_GATE = """
read -r go || exit
exec 3>&2 2>/dev/null  # the shell's own remarks are not the command's last words
trap '${child:+kill -TERM $child}' TERM
python=$1 wrapper=$2; shift 2
"$python" -I -S "$wrapper" --parent $$ -- "$@" 2>&3 3>&- & child=$!
while wait $child; code=$?; kill -0 $child; do :; done
echo $code >"$0.new" && mv "$0.new" "$0"
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


def start(
    command: list[str],
    environment: dict[str, str],
    log_file: Path,
    on_end: Callable[[], None],
    exit_file: Path | None = None,
) -> tuple[Process, Callable[[bool], None]]:
    """Starts a process in a session of its own, held back until the returned function is called.

    Called with True it becomes the command, with False it ends. Its output is appended to the log file, which begins
    anew and may be shortened meanwhile.
    With an `exit_file`, the command's exit code is there once the process has ended, and nothing if it was killed.
    """
    shell = ["/bin/sh", "-c", _GATE, "worker", *command]
    if exit_file is not None:
        shell = ["/bin/sh", "-c", _RECORDING_GATE, str(exit_file), sys.executable, bonds.__file__, *command]
    gate_out, gate_in = os.pipe()
    try:
        log_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        log_file.write_bytes(b"")
        with log_file.open("ab") as output:
            child = subprocess.Popen(
                shell,
                env=environment,
                stdin=gate_out,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        child.returncode = 0  # keeps Popen from waiting for the process: the handle does
        process = Process(child.pid, os.pidfd_open(child.pid), start_time_of(child.pid), on_end)
    except OSError:
        os.close(gate_in)
        raise
    finally:
        os.close(gate_out)

    def release(go: bool) -> None:
        if go:
            with suppress(BrokenPipeError):  # it was killed meanwhile, which the handle tells
                os.write(gate_in, b"go\n")
        os.close(gate_in)

    return process, release


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
