"""What of its owner's environment does not change the stack."""

from __future__ import annotations

import os

import httpx
import pytest

from deploy.local import environment

PROXIES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
DEAD = "http://127.0.0.1:1"


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' own environment is put back afterwards, whatever `settle` does to it."""
    for name in (*PROXIES, *environment._EXEMPTIONS):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
@pytest.mark.parametrize("known", [{}, {"NO_PROXY": "example.com"}, {"no_proxy": "localhost"}])
def test_no_proxy_is_asked_for_this_machine(monkeypatch: pytest.MonkeyPatch, host: str, known: dict[str, str]) -> None:
    for name, value in {"http_proxy": DEAD, **known}.items():
        monkeypatch.setenv(name, value)
    environment.settle()
    with httpx.Client() as client:
        transport = client._transport_for_url(httpx.URL(f"http://{host}:9/"))
        assert transport is client._transport, "a proxy's"


def test_what_was_exempt_from_proxies_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "example.com, localhost")
    monkeypatch.setenv("no_grpc_proxy", "*")
    environment.settle()
    exempt = "example.com,localhost,127.0.0.1,::1"
    assert [os.environ[name] for name in environment._EXEMPTIONS] == [exempt, exempt, "*"]


def test_defaults_of_other_databases_are_not_those_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGSSLMODE", "verify-full")
    environment.settle()
    assert "PGSSLMODE" not in os.environ
