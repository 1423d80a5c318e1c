"""Owns the choice of loopback ports for what only the stack itself talks to."""

import random
import socket

# Below the range that Linux takes for outgoing connections (32768 up), so that nothing grabs the port of a process that
# is being restarted.
_FIRST, _LAST = 15_000, 32_000


def free_port() -> int:
    """Returns a port of 127.0.0.1 that nothing listens on, and that no process which still runs was given.

    It is bound only later, by a process that starts. Until this one ends it holds a claim that all others see: an
    abstract Unix socket (unix(7)) with the port in its name.
    """
    for port in random.sample(range(_FIRST, _LAST), 1000):
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0esd-port-{port}")
            try_to_bind("127.0.0.1", port)
        except OSError:
            claim.close()
        else:
            claim.detach()  # open as long as this process
            return port
    raise RuntimeError("no free port between 15000 and 32000 on 127.0.0.1")


def try_to_bind(host: str, port: int) -> None:
    """Raises OSError if no server could listen on host:port now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as attempt:
        attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        attempt.bind((host, port))
