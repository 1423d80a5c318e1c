"""The process: `python -m services.models` with the settings in the environment."""

import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.local.ports import free_port
from deploy.local.store import process_environment
from tests.conftest import S3Access
from tests.processes import running
from tests.serving import Tokens


async def test_the_process_migrates_and_serves(tmp_path: Path, database_url: str, s3: S3Access, tokens: Tokens) -> None:
    (tmp_path / "key.pem").write_text(tokens.public_key_pem)
    (tmp_path / "secret").write_text("secret")
    port = free_port()
    environment = {
        "ESD_LISTEN": f"127.0.0.1:{port}",
        "ESD_DATABASE_URL": database_url,
        "ESD_IDENTITY_ADDRESS": "127.0.0.1:1",
        "ESD_SECRET_FILE": str(tmp_path / "secret"),
        "ESD_VERIFYING_KEY_FILE": str(tmp_path / "key.pem"),
        "ESD_S3_ENDPOINT_URL": s3.endpoint_url,
        "ESD_S3_BUCKET": s3.bucket,
        "ESD_S3_REGION": s3.region,
        "ESD_S3_ACCESS_KEY": s3.access_key,
        "ESD_S3_SECRET_KEY_FILE": str(s3.secret_key_file),
    }
    with running([sys.executable, "-m", "services.models"], process_environment() | environment) as process:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=60)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        process.terminate()
        assert process.wait(20) == 0
