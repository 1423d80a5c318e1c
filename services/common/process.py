"""Owns the bond between a process and the one that started it: nobody outlives the launcher, however it dies, and
whoever cannot run with its settings says so.

Used as a module (`die_with_launcher()`, `bound()`, `refuse()`) and as a small exec wrapper, so that programs
that are not ours (PostgreSQL, Envoy) are bound too:

    python -I -S services/common/process.py --parent PID [--signal INT] [--user NAME] -- COMMAND ...

The wrapper replaces itself by the command: no process is added.
"""

import argparse
import ctypes
import os
import pwd
import select
import signal
import sys
import threading
from collections.abc import Sequence
from typing import NoReturn

LAUNCHER_PID = "ESD_LAUNCHER_PID"  # the environment variable that die_with_launcher() reads
EXIT_WRONG_SETTING = 2  # of a process that has said which of its settings is wrong: another try would not help
EXIT_INTERRUPTED = 5  # of a command that was asked to end before its work was done, and left in order
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PR_SET_CHILD_SUBREAPER = 36


def die_with_parent(parent: int, signum: int) -> None:
    """Asks the kernel to send `signum` to this process when the thread that started it ends.

    `parent` is the pid the caller expects as its parent; if that one has already gone the process ends at once. The
    wish survives exec, and is lost by a change of user. Without Linux it does nothing.
    """
    if sys.platform != "linux":
        return
    _prctl(_PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent:
        sys.exit(f"the process that started this one (pid {parent}) has gone")


def die_with_launcher() -> None:
    """Ends this process when the launcher named in ESD_LAUNCHER_PID ends, however many processes lie between.

    For a worker: it outlives the endpoints service that started it (which adopts it again), not the stack. Does nothing
    where the variable is not set, that is outside the one-machine stack.
    """
    if (launcher := os.environ.get(LAUNCHER_PID)) and sys.platform == "linux":
        try:
            fd = os.pidfd_open(int(launcher))
        except ProcessLookupError:
            sys.exit(f"the launcher (pid {launcher}) has gone")
        threading.Thread(target=_await_end, args=(fd,), name="die-with-launcher", daemon=True).start()


def refuse(sentence: str) -> NoReturn:
    """Ends this process because it cannot run as it is set up; the sentence names the setting, and what is wrong with
    it. The one-machine stack shows it and does not start; elsewhere it is the last line of the log.

    Raises:
        SystemExit: always, with EXIT_WRONG_SETTING.
    """
    print(sentence, file=sys.stderr, flush=True)
    raise SystemExit(EXIT_WRONG_SETTING)


def adopt_orphans() -> None:
    """Makes this process the parent of descendants whose own parent dies, so that it can find and stop them."""
    if sys.platform == "linux":
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def bound(command: Sequence[str], user: str | None = None, signum: signal.Signals = signal.SIGKILL) -> list[str]:
    """Returns the command wrapped so that it receives `signum` when this process dies, and runs as `user`."""
    wrapper = [sys.executable, "-I", "-S", os.path.abspath(__file__), "--parent", str(os.getpid())]
    wrapper += ["--signal", signum.name.removeprefix("SIG")]
    return [*wrapper, *(["--user", user] if user else []), "--", *command]


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")


def _await_end(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    poll.poll()
    os.kill(os.getpid(), signal.SIGKILL)


def _become(name: str) -> None:
    user = pwd.getpwnam(name)
    if os.geteuid() != user.pw_uid:
        os.setgroups([])
        os.setgid(user.pw_gid)
        os.setuid(user.pw_uid)


def main() -> None:
    """Binds this process to its parent, changes to the user if one is named, and becomes the command."""
    parser = argparse.ArgumentParser(description="run a command that ends when its parent does")
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--signal", default="KILL")
    parser.add_argument("--user")
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    if arguments.user:
        _become(arguments.user)  # before die_with_parent: a change of user clears the wish
    die_with_parent(arguments.parent, signal.Signals[f"SIG{arguments.signal}"])
    try:
        os.execvp(arguments.command[0], arguments.command)  # noqa: S606 - the point of it: no shell, no extra process
    except OSError as error:
        refuse(f"{arguments.command[0]} cannot be started: {error.strerror}")


if __name__ == "__main__":
    main()
