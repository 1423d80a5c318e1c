"""The choice of loopback ports."""

import socket

from deploy.local.ports import free_port, is_free


def test_a_port_that_nobody_has_bound_yet_is_not_given_again() -> None:
    ports = [free_port() for _ in range(500)]
    assert len(set(ports)) == len(ports)


def test_a_port_that_is_listened_on_is_not_given() -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port + 1)):
        assert not is_free("127.0.0.1", port + 1)
        assert free_port() != port + 1
