"""`python -m services.identity` as a process: settings, bootstrap, replicas, an orderly end."""

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.local.ports import free_port
from esd.identity.v1 import ext_authz_pb2 as authz
from esd.identity.v1 import ext_authz_pb2_grpc, identity_pb2_grpc
from esd.identity.v1 import identity_pb2 as pb
from services.identity.keys import new_api_key
from tests.gpu_worker.tables import slow
from tests.processes import running
from tests.serving import AUDIT_KEY, Tokens

COMMAND = [sys.executable, "-m", "services.identity"]


@pytest.fixture
def environment(tmp_path: Path, tokens: Tokens, password_key: str, make_database: Callable[[], str]) -> dict[str, str]:
    """The settings of an identity process, but for its address."""
    files = {
        "secret": "identity's",
        "verifying_key": tokens.public_key_pem,
        "signing_key": tokens.private_key_pem.decode(),
        "secret_hashes": json.dumps({n: hashlib.sha256(n.encode()).hexdigest() for n in ("gateway", "models")}),
        "api_key": new_api_key() + "\n",
        "password_key": password_key,
        "audit_key": AUDIT_KEY,
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    settings = {f"ESD_{name.upper()}_FILE": str(tmp_path / name) for name in files}
    return {"PATH": os.environ["PATH"], "ESD_DATABASE_URL": make_database(), **settings}


def _key(environment: dict[str, str], new: str | None = None) -> str:
    """The first API key, after writing a new one if there is one."""
    file = Path(environment["ESD_API_KEY_FILE"])
    if new is not None:
        file.write_text(new)
    return file.read_text().strip()


async def _healthy(port: int) -> grpc.aio.Channel:
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
    await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=120)
    return channel


async def _status_of_key(channel: grpc.aio.Channel, key: str) -> int:
    request = authz.CheckRequest()
    request.attributes.request.http.headers["x-api-key"] = key
    stub: Any = ext_authz_pb2_grpc.AuthorizationStub(channel)
    response = await stub.Check(request, metadata=(("x-esd-secret", "gateway"),))
    return int(response.status.code)


async def test_replicas_start_at_once_on_an_empty_database_and_drain_on_sigterm(environment: dict[str, str]) -> None:
    ports = [free_port(), free_port()]
    with ExitStack() as stack:
        listening = [{**environment, "ESD_LISTEN": f"127.0.0.1:{port}"} for port in ports]
        processes = [stack.enter_context(running(COMMAND, settings)) for settings in listening]
        key = _key(environment)
        for port in ports:
            async with await _healthy(port) as channel:
                assert await _status_of_key(channel, key) == 0
                stub: Any = identity_pb2_grpc.IdentityServiceStub(channel)
                assert (await stub.IssueToken(pb.IssueTokenRequest(secret="models"))).token
        for process in processes:
            process.send_signal(signal.SIGTERM)
        assert [await asyncio.to_thread(process.wait, 20) for process in processes] == [0, 0]


@pytest.mark.slow
async def test_a_new_first_key_is_added_at_the_next_start_and_the_old_one_stays(environment: dict[str, str]) -> None:
    keys = [_key(environment), new_api_key()]
    for key in keys:
        _key(environment, key)
        port = free_port()
        with running(COMMAND, {**environment, "ESD_LISTEN": f"127.0.0.1:{port}"}):
            async with await _healthy(port) as channel:
                assert await _status_of_key(channel, key) == 0
                assert await _status_of_key(channel, keys[0]) == 0


@pytest.mark.parametrize(
    ("break_", "sentence"),
    [
        (lambda e: e.pop("ESD_SIGNING_KEY_FILE"), "ESD_SIGNING_KEY_FILE"),
        *slow(
            [
                (lambda e: Path(e["ESD_SECRET_HASHES_FILE"]).write_text("[]"), "ESD_SECRET_HASHES_FILE"),
                (lambda e: Path(e["ESD_SECRET_HASHES_FILE"]).write_text('{"gateway": "ab"}'), "not a SHA-256"),
                (lambda e: Path(e["ESD_PASSWORD_KEY_FILE"]).write_text("short"), "ESD_PASSWORD_KEY_FILE"),
                (lambda e: Path(e["ESD_AUDIT_KEY_FILE"]).write_text("short"), "ESD_AUDIT_KEY_FILE"),
                (lambda e: Path(e["ESD_API_KEY_FILE"]).write_text("\n"), "ESD_API_KEY_FILE"),
            ]
        ),
    ],
)
def test_a_wrong_setting_stops_the_process_by_name(
    environment: dict[str, str], break_: Callable[[dict[str, str]], Any], sentence: str
) -> None:
    break_(environment)
    root = Path(__file__).parents[3]
    ended = subprocess.run(COMMAND, env=environment, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode != 0
    assert sentence in ended.stderr
    assert "Traceback" not in ended.stderr
