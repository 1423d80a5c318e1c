"""Owns what the worker's tests share: a tiny checkpoint, an object store over HTTP, and jobs that use both."""

import hashlib
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from aiohttp import web
from safetensors.torch import load_file, save_file

from esd.worker.v1 import worker_pb2
from gpu_worker.__main__ import OFFLINE
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.settings import EngineSettings
from gpu_worker.files.cache import CachedModel, ModelCache
from gpu_worker.files.transfer import Transfer
from gpu_worker.models import tiny
from gpu_worker.worker import Worker


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """diffusers 0.42 builds arrays from tensors in a way that NumPy 2 deprecates, and asks torchsde for noise at a
    level that is one rounding below the last."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore:__array_(_|wrap__):DeprecationWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore:Should have t[ab]:UserWarning:torchsde"))


@pytest.fixture(scope="session", autouse=True)
def offline() -> Iterator[None]:
    """The environment that the worker sets for itself, and one thread, as these tests share the machine."""
    patch = pytest.MonkeyPatch()
    for name, value in OFFLINE.items():
        patch.setenv(name, value)
    torch.set_num_threads(1)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD1.5 checkpoint in the original layout."""
    path = tmp_path_factory.mktemp("checkpoints") / "tiny.safetensors"
    tiny.write(path, seed=1)
    return path


@pytest.fixture(scope="session")
def inpainting_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with a UNet of 9 channels."""
    path = tmp_path_factory.mktemp("inpainting") / "inpainting.safetensors"
    state = load_file(tiny_checkpoint)
    name = "model.diffusion_model.input_blocks.0.0.weight"
    other = tiny.weights(seed=2)[name]
    state[name] = torch.cat([state[name], other, other[:, :1]], 1)
    save_file(state, path, metadata={"esd_config": json.dumps(tiny.config())})
    return path


def as_cached(path: Path, kind: str = "Stable-diffusion") -> CachedModel:
    """A file as the cache would hand it out."""
    return CachedModel(str(path), kind, path.name, path, hashlib.sha256(path.read_bytes()).hexdigest())


@dataclass
class ObjectStore:
    """Objects of a bucket behind URLs. `failures` is how many of the next requests for one answer `refusal`."""

    url: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    failures: int = 0
    refusal: int = 503
    is_full: bool = False

    def put(self, name: str, content: bytes) -> str:
        """Stores an object and answers its URL."""
        self.objects[name] = content
        return f"{self.url}/{name}"

    async def handle(self, request: web.Request) -> web.Response:
        """GET and PUT."""
        name = request.match_info["name"]
        if not name:  # the question whether there is a store
            return web.Response(status=503 if self.failures else 403)
        self.requests.append((request.method, name))
        if self.failures:
            self.failures -= 1
            return web.Response(status=self.refusal)
        if request.method == "PUT" and self.is_full:
            return web.Response(status=503)
        if request.method == "PUT":
            self.objects[name] = await request.read()
            return web.Response()
        if name not in self.objects:
            return web.Response(status=404)
        return web.Response(body=self.objects[name])


@pytest.fixture
async def store() -> AsyncIterator[ObjectStore]:
    """An object store on a port of its own."""
    found = ObjectStore()
    application = web.Application(client_max_size=2**28)
    application.router.add_route("*", "/bucket/{name:.*}", found.handle)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    found.url = f"http://127.0.0.1:{runner.addresses[0][1]}/bucket"
    yield found
    await runner.cleanup()


@pytest.fixture
async def transfer() -> AsyncIterator[Transfer]:
    """A client that gives up within a second."""
    async with Transfer(patience_seconds=1) as client:
        yield client


@pytest.fixture(scope="session")
async def engine() -> AsyncIterator[Engine]:
    """One engine on the CPU for all tests."""
    found = Engine(EngineSettings(device="cpu", num_threads=1))
    found.start()
    await found.ready
    yield found
    await found.stop()


@pytest.fixture
async def worker(engine: Engine, transfer: Transfer, tmp_path: Path) -> AsyncIterator[Worker]:
    """A worker with an empty cache that takes one job at a time."""
    found = Worker(engine, ModelCache(tmp_path / "cache", 2**30, transfer), transfer, max_jobs=1)
    yield found
    await found.stop()


@pytest.fixture
def make_spec(store: ObjectStore, tiny_checkpoint: Path) -> Any:
    """Makes the spec of a small job; keyword arguments go into the payload."""
    content = tiny_checkpoint.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()

    def make(task_type: str = "txt2img", num_uploads: int = 2, **payload: Any) -> worker_pb2.JobSpec:
        job_id = str(uuid4())
        small = {"prompt": "a cat", "steps": 2, "width": 64, "height": 64, "seed": 7, "sampler_name": "Euler"}
        spec = worker_pb2.JobSpec(
            job_id=job_id,
            task_type=task_type,
            models=[
                worker_pb2.ModelFile(
                    type="Stable-diffusion",
                    name="tiny.safetensors",
                    url=store.put("tiny.safetensors", content),
                    size_bytes=len(content),
                    cache_key=sha256,
                    sha256=sha256,
                )
            ],
            image_uploads=[upload(store, job_id, f"image_{index}.png") for index in range(num_uploads)],
            param_upload=upload(store, job_id, f"{job_id}_param.json"),
            endpoint_name="esd-async-test",
        )
        spec.payload.update(small | payload)
        return spec

    return make


def upload(store: ObjectStore, job_id: str, name: str) -> worker_pb2.Upload:
    """A place for a result."""
    return worker_pb2.Upload(name=name, url=f"{store.url}/{job_id}/{name}")
