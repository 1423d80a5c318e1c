"""Owns Envoy's process: starts it, ends as it ends, and at SIGTERM lets what is under way come to its end first.

    python -I -S gateway/drain.py --linger 5 --stop 45 -- ENVOY ...

The standard library alone, since this interpreter stays beside Envoy for as long as the gateway runs. Envoy's admin
interface is `admin.socket` in the working directory.
"""

import argparse
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from urllib.parse import quote

_NEWS = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}
_FOR_EVER = 1e9  # seconds; sigtimedwait takes no infinity
_LOOK_SECONDS = 0.1  # Envoy tells nobody when a request ends
# One look sees nothing between two requests of a client, or where the bytes of an answer are not counted yet.
_QUIET_LOOKS = 4
# What clients wait for: requests of the two listeners, and bytes of answers that are still to be sent.
_THEIRS = r"^http\.(document|webui)\.downstream_(rq_active|cx_tx_bytes_buffered)"
# Of these requests, workers' streams. They end when the worker does, so nobody waits for them: workers open them again
# elsewhere, and their jobs go on.
_WORKERS = r"^cluster\.(queue|trainer)\.upstream_rq_active"


class _Admin(http.client.HTTPConnection):
    """A connection to the admin interface, which closes it after each answer."""

    def __init__(self) -> None:
        super().__init__("admin", timeout=5)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect("admin.socket")


def _ask(method: str, path: str) -> str:
    connection = _Admin()
    try:
        connection.request(method, path)
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def _total(gauges: str) -> int:
    """The sum of the gauges whose names match."""
    lines = _ask("GET", f"/stats?filter={quote(gauges)}").splitlines()
    return sum(int(line.rsplit(":", 1)[1]) for line in lines)


def _news(envoy: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The next signal to stop, or that Envoy has ended; None if neither comes within so many seconds. Of other children
    there is no news: Envoy makes none, but the first process of a container is given the orphans of `kubectl exec`."""
    end = time.monotonic() + seconds
    while found := signal.sigtimedwait(_NEWS, max(0.0, end - time.monotonic())):
        if found.si_signo != signal.SIGCHLD or envoy.poll() is not None:
            return found.si_signo
    return None


def _drain(envoy: subprocess.Popen[bytes], linger_seconds: float, stop_seconds: float) -> None:
    """Returns when nothing is under way, when the times are over, when Envoy ends or when a second signal comes."""
    _ask("POST", "/healthcheck/fail")  # from now on each answer ends its connection
    if _news(envoy, linger_seconds):
        return
    _ask("POST", "/drain_listeners")
    end, quiet_looks = time.monotonic() + stop_seconds, 0
    while quiet_looks < _QUIET_LOOKS and time.monotonic() < end:
        quiet_looks = 0 if _total(_THEIRS) > _total(_WORKERS) else quiet_looks + 1
        if _news(envoy, _LOOK_SECONDS):
            return


def run(command: Sequence[str], linger_seconds: float, stop_seconds: float) -> int:
    """Runs Envoy and returns its exit status. A signal meets this process alone, also one of a terminal."""
    envoy = subprocess.Popen(command, start_new_session=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, _NEWS)
    if envoy.poll() is None and _news(envoy, _FOR_EVER) != signal.SIGCHLD:
        try:
            _drain(envoy, linger_seconds, stop_seconds)
        except (OSError, http.client.HTTPException) as error:  # it has only begun to start, or hangs
            print(f"requests under way are not waited for: {error}", file=sys.stderr, flush=True)
        envoy.terminate()
    status = envoy.wait()
    return status if status >= 0 else 128 - status


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="run Envoy, and let requests under way end before it does")
    parser.add_argument("--linger", type=float, required=True, help="seconds for which it still listens")
    parser.add_argument("--stop", type=float, required=True, help="seconds after that for what is under way")
    parser.add_argument("--temporary", action="store_true", help="remove the working directory when Envoy has ended")
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    status = run(arguments.command, arguments.linger, arguments.stop)
    if arguments.temporary:
        import shutil  # noqa: PLC0415 - it is of use at the end only

        shutil.rmtree(os.getcwd())
    sys.exit(status)


if __name__ == "__main__":
    main()
