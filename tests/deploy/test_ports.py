"""The choice of loopback ports."""

import socket
import subprocess
import sys

import pytest

from deploy.local.ports import free_port, try_to_bind
from tests.processes import ROOT


def test_a_port_that_nobody_has_bound_yet_is_not_given_again() -> None:
    ports = [free_port() for _ in range(500)]
    assert len(set(ports)) == len(ports)


def test_no_port_is_given_to_two_processes() -> None:
    program = "from deploy.local.ports import free_port; print(*(free_port() for _ in range(400)), flush=True); input()"
    command = [sys.executable, "-c", program]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as one, subprocess.Popen(command, cwd=ROOT, **pipes) as other:
        assert one.stdout is not None
        assert other.stdout is not None
        given = {*one.stdout.readline().split(), *other.stdout.readline().split()}
        one.communicate("\n")
        other.communicate("\n")
    assert len(given) == 800


def test_a_port_that_is_listened_on_is_not_given() -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port + 1)):
        with pytest.raises(OSError, match="Address already in use"):
            try_to_bind("127.0.0.1", port + 1)
        assert free_port() != port + 1
