"""The process: `python -m services.models` with the settings in the environment."""

import asyncio
import sys
from pathlib import Path

import grpc
import psutil
import pytest
from google.protobuf.json_format import MessageToDict
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.local.ports import free_port
from esd.models.v1 import models_pb2 as pb
from esd.models.v1 import models_pb2_grpc
from tests.conftest import S3Access
from tests.processes import process_environment, running
from tests.services.models.files import MIB, safetensors
from tests.services.models.source import serving_files
from tests.serving import AUDIT_KEY, Tokens

COMMAND = [sys.executable, "-m", "services.models"]


@pytest.fixture
def environment(tmp_path: Path, database_url: str, s3: S3Access, tokens: Tokens) -> dict[str, str]:
    """The settings of a models process."""
    (tmp_path / "key.pem").write_text(tokens.public_key_pem)
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "audit").write_text(AUDIT_KEY)
    return process_environment() | {
        "ESD_LISTEN": f"127.0.0.1:{free_port()}",
        "ESD_DATABASE_URL": database_url,
        "ESD_IDENTITY_ADDRESS": "127.0.0.1:1",
        "ESD_SECRET_FILE": str(tmp_path / "secret"),
        "ESD_AUDIT_KEY_FILE": str(tmp_path / "audit"),
        "ESD_VERIFYING_KEY_FILE": str(tmp_path / "key.pem"),
        "ESD_S3_ENDPOINT_URL": s3.endpoint_url,
        "ESD_S3_BUCKET": s3.bucket,
        "ESD_S3_REGION": s3.region,
        "ESD_S3_ACCESS_KEY": s3.access_key,
        "ESD_S3_SECRET_KEY_FILE": str(s3.secret_key_file),
        "ESD_IMPORT_ALLOWED_NETWORKS": '["127.0.0.0/8"]',
        "ESD_IMPORT_MAX_BYTES": str(1024 * MIB),
    }


async def _wait_until_serving(channel: grpc.aio.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    answer = await health.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=120)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_the_process_migrates_and_serves(environment: dict[str, str]) -> None:
    with running(COMMAND, environment) as process:
        async with grpc.aio.insecure_channel(environment["ESD_LISTEN"]) as channel:
            await _wait_until_serving(channel)
        process.terminate()
        assert process.wait(120) == 0


@pytest.mark.slow
@pytest.mark.parametrize("end", ["kill", "terminate"])
async def test_an_import_goes_on_after_the_process_has_ended(
    environment: dict[str, str], tokens: Tokens, end: str
) -> None:
    ann = tokens.user("ann", ["checkpoint:all"], ["designer"])
    content = safetensors(23 * MIB)

    async def show(stub: models_pb2_grpc.ModelsServiceStub) -> dict[str, object]:
        answer = await stub.ListCheckpoints(pb.ListCheckpointsRequest(), metadata=ann)
        (item,) = MessageToDict(answer)["checkpoints"]
        return dict(item)

    async with serving_files() as source:
        source.gate.clear()
        url = source.put("/a.safetensors", content)
        source.stop_after["/a.safetensors"] = [16 * MIB]
        with running(COMMAND, environment) as process:
            async with grpc.aio.insecure_channel(environment["ESD_LISTEN"]) as channel:
                await _wait_until_serving(channel)
                stub = models_pb2_grpc.ModelsServiceStub(channel)
                request = pb.CreateCheckpointRequest(checkpoint_type="Lora", urls=[url], params={"message": "m"})
                await stub.CreateCheckpoint(request, metadata=ann)
                async with asyncio.timeout(120):
                    while str(10 * MIB) not in str(await show(stub)):  # noqa: ASYNC110
                        await asyncio.sleep(0.05)
            getattr(process, end)()
            assert process.wait(120) == (-9 if end == "kill" else 0)
        with running(COMMAND, environment | {"PYTHONDONTWRITEBYTECODE": "1"}) as process:
            async with grpc.aio.insecure_channel(environment["ESD_LISTEN"]) as channel:
                await _wait_until_serving(channel)
                stub = models_pb2_grpc.ModelsServiceStub(channel)
                async with asyncio.timeout(120):
                    while (await show(stub))["status"] == "Initial":  # noqa: ASYNC110
                        await asyncio.sleep(0.1)
                assert (await show(stub))["status"] == "Active"
                written = psutil.Process(process.pid).io_counters().write_bytes
                assert written < MIB, "nothing of it touches the disk"
        assert source.asked == [("/a.safetensors", ""), ("/a.safetensors", str(10 * MIB))]
