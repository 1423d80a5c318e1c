"""Whatever jobs ask for, in all combinations: they end with their pictures, the same alone and in company."""

import asyncio
import hashlib
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save

from esd.worker.v1 import worker_pb2
from gpu_worker.engine.engine import Engine
from gpu_worker.files.cache import ModelCache
from gpu_worker.files.transfer import Transfer
from gpu_worker.job import Job
from gpu_worker.models import tiny
from gpu_worker.worker import Worker, is_last
from services.common.errors import InvalidArgument
from services.common.payloads import check
from tests.any_payload import EDITS, GENERATIONS
from tests.gpu_worker import tiny_controlnet, tiny_esrgan, tiny_lora, tiny_sdxl
from tests.gpu_worker.conftest import ObjectStore, upload

JOB = "job"  # of whose id the payloads have nothing, as they say their seeds
MAX_IMAGES = 16
Payload = tuple[str, dict[str, Any]]
ModelFiles = list[tuple[str, str, bytes]]


def _is_possible(payload: Payload) -> bool:
    try:
        return check(*payload, JOB).num_images <= MAX_IMAGES
    except InvalidArgument:
        return False


PAYLOADS = st.one_of(GENERATIONS, GENERATIONS, EDITS).filter(_is_possible)


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def models(request: Any, tmp_path_factory: Any, tiny_checkpoint: Path, inpainting_checkpoint: Path) -> ModelFiles:
    """The files that the payloads name."""
    folder = tmp_path_factory.mktemp("models")
    tiny_esrgan.write(folder / "4x-tiny.pth")
    found = [("ESRGAN", "4x-tiny.pth", (folder / "4x-tiny.pth").read_bytes())]
    if request.param == "sd15":
        checkpoints = {"first": tiny_checkpoint, "second": folder / "second", "inpainting": inpainting_checkpoint}
        tiny.write(checkpoints["second"], seed=2)
        unet, embedding = UNet2DConditionModel(**tiny.config()["unet"]), {"emb_params": torch.ones(2, 32)}
    else:
        made = {
            name: tiny_sdxl.make(folder / name, seed=seed)
            for seed, name in enumerate(("first", "second", "inpainting"))
        }
        checkpoints = {name: each.path for name, each in made.items()}
        unet, embedding = made["first"].parts["unet"], {"clip_l": torch.ones(2, 32), "clip_g": torch.ones(2, 48)}
    found += [("Stable-diffusion", f"{name}.safetensors", path.read_bytes()) for name, path in checkpoints.items()]
    found.append(("VAE", "vae.safetensors", checkpoints["second"].read_bytes()))
    layers = {name: value for name, value in tiny_lora.state().items() if name.startswith("lora_unet")}
    for kind, name, state in (
        ("Lora", "style", layers),
        ("embeddings", "amypt", embedding),
        ("ControlNet", "control", tiny_controlnet.make(unet, 0).state_dict()),
    ):
        found.append((kind, f"{name}.safetensors", save({key: value.contiguous() for key, value in state.items()})))
    return found


@pytest.fixture
async def worker(engine: Engine, transfer: Transfer, tmp_path: Path) -> AsyncIterator[Worker]:
    found = Worker(engine, ModelCache(tmp_path / "cache", 2**30, transfer), transfer, max_jobs=8)
    yield found
    await found.stop()


def spec_of(store: ObjectStore, models: ModelFiles, payload: Payload) -> worker_pb2.JobSpec:
    """A job with all the models."""
    job_id = str(uuid4())
    spec = worker_pb2.JobSpec(
        job_id=job_id,
        task_type=payload[0],
        image_uploads=[upload(store, job_id, f"image_{index}.png") for index in range(MAX_IMAGES)],
        param_upload=upload(store, job_id, f"{job_id}_param.json"),
    )
    for kind, name, content in models:
        sha256 = hashlib.sha256(content).hexdigest()
        url = store.put(name, content)
        spec.models.add(type=kind, name=name, url=url, size_bytes=len(content), cache_key=sha256, sha256=sha256)
    spec.payload.update(payload[1])
    return spec


class Heard:
    """A job under way: `moved` comes with its first step, or its end, and `last` with its last event."""

    def __init__(self, worker: Worker, spec: worker_pb2.JobSpec) -> None:
        loop = asyncio.get_running_loop()
        self.moved: asyncio.Future[None] = loop.create_future()
        self.last: asyncio.Future[worker_pb2.JobEvent] = loop.create_future()
        self.job = Job(spec, self._hear)
        worker.submit(self.job)

    def _hear(self, event: worker_pb2.JobEvent) -> None:
        if event.WhichOneof("event") != "started" and not self.moved.done():
            self.moved.set_result(None)
        if is_last(event):
            self.last.set_result(event)


async def pictures(store: ObjectStore, heard: Heard) -> list[NDArray[np.int64]]:
    """What the job made."""
    last = await heard.last
    assert last.WhichOneof("event") == "done", last.failed.reason
    files = [store.objects[f"{heard.job.id}/{image.name}"] for image in last.done.images]
    return [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(np.int64) for file in files]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Generating overly large repr")  # of the strategy, when it draws again
@settings(
    max_examples=5,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(st.lists(PAYLOADS, min_size=6, max_size=6))
async def test_jobs_join_others_that_come_and_go_and_have_the_pictures_that_they_have_alone(
    worker: Worker, store: ObjectStore, models: ModelFiles, payloads: list[Payload]
) -> None:
    store.objects.clear()
    specs = [spec_of(store, models, payload) for payload in payloads]
    jobs = []
    for some in (specs[:4], specs[4:]):  # the others join when the first have begun to move
        jobs += [Heard(worker, spec) for spec in some]
        await asyncio.wait([job.moved for job in jobs[-len(some) :]], return_when=asyncio.FIRST_COMPLETED)
    jobs[0].job.cancel()
    for job, payload in zip(jobs[1:], payloads[1:], strict=True):
        found = await pictures(store, job)
        expected = await pictures(store, Heard(worker, spec_of(store, models, payload)))
        assert [each.shape for each in found] == [each.shape for each in expected]
        for one, other in zip(found, expected, strict=True):
            # Rounding moves a level here and there, and what is unsteady about it (a threshold) a pixel.
            assert (np.abs(one - other) > 2).mean() < 0.001, payload
