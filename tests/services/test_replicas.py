"""Every service as two processes: they start at once on an empty database, and drain when they are told to stop.

Identity, which wants more settings, has the same in identity/test_main.py.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.local.home import SERVICES
from deploy.local.ports import free_port
from tests.conftest import S3Access
from tests.processes import running
from tests.serving import Tokens

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def environment(tmp_path: Path, tokens: Tokens, make_database: Callable[[], str], s3: S3Access) -> dict[str, str]:
    """The settings of a service's process, but for its address. The services that it asks are not there."""
    (tmp_path / "verifying_key").write_text(tokens.public_key_pem)
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "audit_key").write_text("a" * 43)
    return {
        "PATH": os.environ["PATH"],
        "ESD_DATABASE_URL": make_database(),
        "ESD_VERIFYING_KEY_FILE": str(tmp_path / "verifying_key"),
        "ESD_SECRET_FILE": str(tmp_path / "secret"),
        "ESD_AUDIT_KEY_FILE": str(tmp_path / "audit_key"),
        "ESD_WORKER_DIR": str(tmp_path / "worker"),
        "ESD_S3_ENDPOINT_URL": s3.endpoint_url,
        "ESD_S3_BUCKET": s3.bucket,
        "ESD_S3_REGION": s3.region,
        "ESD_S3_ACCESS_KEY": s3.access_key,
        "ESD_S3_SECRET_KEY_FILE": str(s3.secret_key_file),
        **{f"ESD_{name.upper()}_ADDRESS": "127.0.0.1:1" for name in SERVICES},
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(SERVICES) - {"identity"}))
async def test_replicas_start_at_once_on_an_empty_database_and_drain_on_sigterm(
    environment: dict[str, str], name: str
) -> None:
    ports = [free_port(), free_port()]
    with ExitStack() as stack:
        command = [sys.executable, "-m", f"services.{name}"]
        listening = [{**environment, "ESD_LISTEN": f"127.0.0.1:{port}"} for port in ports]
        processes = [stack.enter_context(running(command, settings)) for settings in listening]
        for port, process in zip(ports, processes, strict=True):
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                request = health_pb2.HealthCheckRequest()
                watch = health_pb2_grpc.HealthStub(channel).Watch(request, wait_for_ready=True, timeout=90)
                assert (await watch.read()).status == SERVING
                process.send_signal(signal.SIGTERM)
                # A load balancer hears it on the open stream before the process goes.
                assert (await watch.read()).status == NOT_SERVING
                watch.cancel()
                assert await asyncio.to_thread(process.wait, 30) == 0
