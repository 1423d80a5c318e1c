"""Owns what the one-machine stack consists of: each process with its command, environment and port."""

from __future__ import annotations

import errno
import os
import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from deploy.local.home import AUDITED, S3_ACCESS_KEY, S3_BUCKET, S3_REGION, SERVICES, CannotRunError, Home
from deploy.local.ports import free_port, try_to_bind
from deploy.local.postgres import Postgres
from deploy.local.store import Store
from gateway.settings import split_address
from services.common.process import LAUNCHER_PID, bound
from services.common.settings import SOME_URLS, URL

# Settings of the gateway that are taken from the launcher's own environment.
_FILES = ("ESD_TLS_CERT_FILE", "ESD_TLS_KEY_FILE")
# From the addresses that stand for all of this machine's to those at which it finds itself.
_ITSELF = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104 - compared, not bound


class PortRefusedError(CannotRunError):
    """A port that users asked for is taken, or cannot be had; the message names it and the setting."""


@dataclass(frozen=True)
class Program:
    """One supervised process. `stage` orders start (ascending) and stop (descending); `once` ends by itself with 0."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    port: int | None = None
    stage: int = 1
    stop_signal: str = "TERM"
    once: bool = False


@dataclass(frozen=True)
class Options:
    """What the user chose. `listen` is host:port of the gateway; port 0 means any free one. `webui_port` likewise.

    `replicas` is how many processes each service has.
    """

    home: Path
    listen: str = "127.0.0.1:8080"
    webui_port: int | None = None
    insecure: bool = False
    replicas: int = 1


@dataclass(frozen=True)
class Plan:
    """The processes, and the addresses at which users find them. `probe_url` is the gateway seen from this machine."""

    programs: list[Program]
    url: str
    webui_url: str | None
    probe_url: str
    ports: dict[str, int]


def make_plan(options: Options, home: Home) -> Plan:
    """Chooses the ports and lays out the processes.

    Raises:
        PortRefusedError: nobody can listen on the port of the gateway or of the webui.
        CannotRunError: ESD_PUBLIC_URL is no URL.
    """
    host, gateway_port = split_address(options.listen)
    if gateway_port and gateway_port == options.webui_port:
        raise PortRefusedError(f"the webui needs a port of its own: --webui-port is {gateway_port} like the gateway's")
    gateway_port = _take(host, gateway_port, "--listen or ESD_LISTEN")
    webui_port = options.webui_port
    if webui_port is not None:
        webui_port = _take(host, webui_port, "--webui-port or ESD_WEBUI_PORT")
    services = {replica: name for name in SERVICES for replica in _replicas(name, options.replicas)}
    ports = {name: free_port() for name in ("postgres", "swift", *services)}
    scheme = "https" if os.environ.get("ESD_TLS_CERT_FILE") else "http"
    bracketed = f"[{host}]" if ":" in host else host
    reachable = socket.gethostname() if host in _ITSELF else bracketed
    url = os.environ.get("ESD_PUBLIC_URL") or f"{scheme}://{reachable}:{gateway_port}"
    if not re.match(URL, url):
        raise CannotRunError(f"setting ESD_PUBLIC_URL: a value such as {SOME_URLS[0]} is wanted (given: {url!r})")
    local_url = f"{scheme}://{_ITSELF.get(host, bracketed)}:{gateway_port}"

    postgres, store = Postgres(home, ports["postgres"]), Store(home, ports["swift"])
    common = _common_environment(home, store, url, ports)
    gateway = {
        **common,
        "ESD_LISTEN": f"{bracketed}:{gateway_port}",
        "ESD_WEBUI_PORT": "" if webui_port is None else str(webui_port),
        "ESD_INSECURE": "true" if options.insecure else "false",
        "ESD_SECRET_FILE": str(home.secret_file("gateway")),
        "ESD_RUN_DIR": str(home.run / "gateway"),
        **{name: str(Path(os.environ[name]).absolute()) for name in _FILES if os.environ.get(name)},
    }
    # This machine's workers need no name of it. With TLS they do: that in the certificate, which they trust.
    certified = {"ESD_PUBLIC_URL": url, "SSL_CERT_FILE": str(home.trust_file)}
    of_workers = {**common, **(certified if scheme == "https" else {"ESD_PUBLIC_URL": local_url})}
    ready = {**of_workers, "ESD_PROBE_URL": local_url + os.environ.get("ESD_BASE_PATH", "")}
    programs = [
        Program("postgres", postgres.command(options.replicas), {}, ports["postgres"], stop_signal="INT"),
        Program("swift", store.command(), store.environment(), ports["swift"]),
        _step("bootstrap", home, {"ESD_POSTGRES_PORT": str(ports["postgres"]), "ESD_SWIFT_PORT": str(ports["swift"])}),
        *(
            _service(replica, name, home, postgres, of_workers if name == "endpoints" else common, ports[replica])
            for replica, name in services.items()
        ),
        Program("gateway", bound([sys.executable, "-m", "gateway"]), gateway, gateway_port, stage=3),
        _step("ready", home, ready, stage=3),
    ]
    webui_url = None if webui_port is None else f"{scheme}://{reachable}:{webui_port}"
    return Plan(programs, url, webui_url, ready["ESD_PROBE_URL"], {**ports, "gateway": gateway_port})


def _common_environment(home: Home, store: Store, url: str, ports: dict[str, int]) -> dict[str, str]:
    return {
        LAUNCHER_PID: str(os.getpid()),
        **{f"ESD_{name.upper()}_ADDRESS": ",".join(addresses) for name, addresses in _addresses_of(ports).items()},
        "ESD_VERIFYING_KEY_FILE": str(home.verifying_key_file),
        "ESD_S3_ENDPOINT_URL": store.url,
        "ESD_S3_PUBLIC_URL": os.environ.get("ESD_S3_PUBLIC_URL") or url,
        "ESD_S3_BUCKET": S3_BUCKET,
        "ESD_S3_REGION": S3_REGION,
        "ESD_S3_ACCESS_KEY": S3_ACCESS_KEY,
        "ESD_S3_SECRET_KEY_FILE": str(home.s3_secret_key_file),
    }


def _replicas(name: str, count: int) -> list[str]:
    """The names of a service's processes: identity, identity-2, …"""
    return [name, *(f"{name}-{number}" for number in range(2, count + 1))]


def _addresses_of(ports: Mapping[str, int | None]) -> dict[str, list[str]]:
    """The addresses of each service's replicas, by the names and ports of its processes."""
    return {
        name: [f"127.0.0.1:{port}" for process, port in ports.items() if process.partition("-")[0] == name]
        for name in SERVICES
    }


def _service(replica: str, name: str, home: Home, postgres: Postgres, common: dict[str, str], port: int) -> Program:
    environment = {
        **common,
        "ESD_LISTEN": f"127.0.0.1:{port}",
        "ESD_DATABASE_URL": postgres.url(name),
        "ESD_SECRET_FILE": str(home.secret_file(name)),
    }
    if name in AUDITED:
        environment["ESD_AUDIT_KEY_FILE"] = str(home.audit_key_file(name))
    if name == "identity":
        environment |= {
            "ESD_SIGNING_KEY_FILE": str(home.signing_key_file),
            "ESD_SECRET_HASHES_FILE": str(home.secret_hashes_file),
            "ESD_API_KEY_FILE": str(home.api_key_file),
            "ESD_PASSWORD_KEY_FILE": str(home.password_key_file),
        }
    if name == "endpoints":
        # With ESD_CLUSTER=kubernetes, workers run on a cluster that reaches this gateway; the rest stays here.
        environment |= {"ESD_CLUSTER": os.environ.get("ESD_CLUSTER", "local"), "ESD_WORKER_DIR": str(home.worker)}
    return Program(replica, bound([sys.executable, "-m", f"services.{name}"]), environment, port, stage=2)


def _step(name: str, home: Home, environment: dict[str, str], stage: int = 1) -> Program:
    command = bound([sys.executable, "-m", "deploy.local.steps", name])
    return Program(name, command, {**environment, "ESD_HOME": str(home.path)}, stage=stage, once=True)


def _take(host: str, port: int, setting: str) -> int:
    if port == 0:
        return free_port()
    try:
        try_to_bind("127.0.0.1" if host == "localhost" else host, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            problem = f"port {port} of {host} is in use: stop what listens there, or choose another with {setting}"
        else:
            problem = f"nobody can listen on port {port} of {host} here ({error.strerror}): see {setting}"
        raise PortRefusedError(problem) from None
    return port
