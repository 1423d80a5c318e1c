"""What a worker does when its GPU fails under a job."""

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from gpu_worker.engine.fault import EXIT_DEVICE_FAILED, EXIT_ENGINE_BROKEN, is_device_failure
from tests.gpu_worker.doors import SECRET, services

# Real faults cannot be had: what fails raises what it would raise then.
IN_A_CALL = """
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

def forward(*_, **__):
    raise RuntimeError("CUDA error: an illegal memory access was encountered\\nCUDA kernel errors might be ...")

UNet2DConditionModel.forward = forward
"""
BEHIND_A_CALL = """
from gpu_worker.devices import Cpu

def seconds(*_):
    raise RuntimeError("what an engine does not foresee")

Cpu.seconds = seconds
"""
STUCK_IN_A_CALL = """
import threading
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from gpu_worker.devices import Cpu

Cpu.patience_seconds = 1.0
UNet2DConditionModel.forward = lambda *_, **__: threading.Event().wait()
"""
MAIN = """
from gpu_worker.__main__ import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("breaking", "code", "reason"),
    [
        (IN_A_CALL, EXIT_DEVICE_FAILED, "reason='CUDA error: an illegal memory access was encountered'"),
        (BEHIND_A_CALL, EXIT_ENGINE_BROKEN, "what an engine does not foresee"),
        (STUCK_IN_A_CALL, EXIT_ENGINE_BROKEN, "nothing has moved in the engine"),
    ],
)
async def test_a_worker_that_cannot_go_on_ends_and_leaves_its_job_to_another(
    tmp_path: Path, make_spec: Any, breaking: str, code: int, reason: str
) -> None:
    (tmp_path / "secret").write_text(SECRET)
    async with services() as peers:
        own = {"ESD_SECRET_FILE": str(tmp_path / "secret"), "ESD_CACHE_DIR": str(tmp_path), "ESD_DEVICE": "cpu"}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            breaking + MAIN,
            env=os.environ | own | {"ESD_NUM_THREADS": "1", "ESD_SERVER_URL": f"http://{peers.address}"},
            stderr=asyncio.subprocess.PIPE,
        )
        connection = await peers.queue.connection()
        await connection.welcome()
        await connection.until_room()
        await connection.assign("lease-1", make_spec())
        _, log = await process.communicate()
        assert process.returncode == code, log.decode()
        assert reason in log.decode()
        while await connection.read() is not grpc.aio.EOF:
            pass
    events = [message.event.event for message in connection.seen if message.HasField("event")]
    assert [event.WhichOneof("event") for event in events] in ([], ["started"])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("CUDA error: device-side assert triggered"), True),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("CUDA error"), False),
    ],
)
def test_only_an_error_of_the_device_itself_ends_the_worker(error: Exception, expected: bool) -> None:
    assert is_device_failure(error) is expected
