"""What a worker does when its GPU fails under a job."""

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from gpu_worker.fault import EXIT_DEVICE_FAILED, is_device_failure
from tests.gpu_worker.doors import SECRET, services

# A real fault of a GPU cannot be had: the model raises what torch raises then.
WORKER = """
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

def forward(*_, **__):
    raise RuntimeError("CUDA error: an illegal memory access was encountered\\nCUDA kernel errors might be ...")

UNet2DConditionModel.forward = forward

from gpu_worker.__main__ import main
main()
"""


@pytest.mark.slow
async def test_a_worker_whose_gpu_fails_ends_and_leaves_its_job_to_another(tmp_path: Path, make_spec: Any) -> None:
    (tmp_path / "secret").write_text(SECRET)
    async with services() as peers:
        own = {"ESD_SECRET_FILE": str(tmp_path / "secret"), "ESD_CACHE_DIR": str(tmp_path), "ESD_DEVICE": "cpu"}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            WORKER,
            env=os.environ | own | {"ESD_NUM_THREADS": "1", "ESD_SERVER_URL": f"http://{peers.address}"},
            stderr=asyncio.subprocess.PIPE,
        )
        connection = await peers.queue.connection()
        await connection.welcome()
        await connection.until_room()
        await connection.assign("lease-1", make_spec())
        _, log = await process.communicate()
        assert process.returncode == EXIT_DEVICE_FAILED, log.decode()
        assert "reason='CUDA error: an illegal memory access was encountered'" in log.decode()
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
