"""A worker on a GPU, where the machine has one, from its door to the object store."""

import asyncio
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from esd.worker.v1 import worker_pb2
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.settings import EngineSettings
from gpu_worker.files.cache import ModelCache
from gpu_worker.files.transfer import Transfer
from gpu_worker.job import Job
from gpu_worker.worker import Worker, is_last
from tests.gpu_worker.conftest import ObjectStore

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device on this machine"),
]


@pytest.fixture
async def gpu_worker(transfer: Transfer, tmp_path: Path) -> AsyncIterator[Worker]:
    engine = Engine(EngineSettings(device=DEVICE))
    engine.start()
    await engine.ready
    worker = Worker(engine, ModelCache(tmp_path / "cache", 2**30, transfer), transfer, max_jobs=1)
    yield worker
    await worker.stop()
    await engine.stop()


async def test_a_job_on_the_gpu_leaves_a_finished_picture(
    gpu_worker: Worker, store: ObjectStore, make_spec: Any
) -> None:
    assert gpu_worker.device.startswith(DEVICE)
    spec = make_spec(width=128, height=64, steps=4, num_uploads=1)
    events: asyncio.Queue[worker_pb2.JobEvent] = asyncio.Queue()
    gpu_worker.submit(Job(spec, events.put_nowait))
    while not is_last(event := await events.get()):
        pass
    assert event.HasField("done"), event.failed.reason
    image = Image.open(io.BytesIO(store.objects[f"{spec.job_id}/image_0.png"]))
    assert image.size == (128, 64)
    # Half precision can overflow to NaN, which becomes black (and a warning, which is an error here).
    assert np.asarray(image).std() > 0
