"""Whether parts of the stack can be reached."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from socket import create_server

import certifi
import pytest

from deploy.local.health import distrust
from deploy.local.ports import free_port
from tests.gateway.test_start import make_certificate


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    return make_certificate(tmp_path)[0]


@pytest.fixture
def port(certificate: Path) -> Iterator[int]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, certificate.parent / "key.pem")
    with create_server(("127.0.0.1", 0)) as plain, context.wrap_socket(plain, server_side=True) as server:

        def serve() -> None:
            while True:
                try:
                    server.accept()[0].close()
                except ssl.SSLError:  # a client that does not trust it
                    continue
                except OSError:
                    return

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        with suppress(OSError):
            server.shutdown(2)  # which wakes the thread
    thread.join()


def test_a_self_made_certificate_is_good_for_who_trusts_it_and_for_its_own_name(certificate: Path, port: int) -> None:
    assert distrust(f"https://localhost:{port}", certificate) is None
    assert "self-signed certificate" in (distrust(f"https://localhost:{port}", Path(certifi.where())) or "")
    assert "not valid for '127.0.0.1'" in (distrust(f"https://127.0.0.1:{port}", certificate) or "")


def test_a_gateway_that_is_not_there_is_no_matter_of_trust(certificate: Path) -> None:
    assert distrust(f"https://localhost:{free_port()}", certificate) == "Connection refused"
