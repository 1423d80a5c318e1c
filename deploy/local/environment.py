"""Owns what of its owner's environment must not change the stack: proxies, and defaults of PostgreSQL's clients."""

from __future__ import annotations

import os
from urllib.request import getproxies_environment

_EXEMPTIONS = ("no_proxy", "NO_PROXY", "no_grpc_proxy")
_THIS_MACHINE = ("127.0.0.1", "localhost", "::1")


def settle() -> None:
    """Changes this process's environment, which all parts of the stack inherit."""
    # gRPC, boto3 and httpx would send what goes to this machine, keys and tokens included, to the proxy.
    exempt = getproxies_environment().get("no", "")
    for name in _EXEMPTIONS:
        os.environ[name] = _with_this_machine(os.environ.get(name) or exempt)
    # libpq takes from PGSSLMODE, PGOPTIONS and the like whatever a connection does not say.
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]


def _with_this_machine(exempt: str) -> str:
    hosts = [host.strip() for host in exempt.split(",") if host.strip()]
    return exempt if "*" in hosts else ",".join([*hosts, *(host for host in _THIS_MACHINE if host not in hosts)])
