"""The object store goes away in the middle of a job and comes back: a real store, behind a line that can be shut."""

import asyncio
import hashlib
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from botocore.credentials import Credentials
from structlog.testing import capture_logs

from esd.worker.v1 import worker_pb2
from gpu_worker.engine.engine import Engine
from gpu_worker.files.cache import ModelCache
from gpu_worker.files.transfer import Transfer
from gpu_worker.job import Job, JobError
from gpu_worker.stream import WorkStream
from gpu_worker.worker import Worker, is_last
from services.common.blobs import Blobs
from services.common.clients import TokenSource, plain_channel
from services.common.presigning import Presigner
from tests.conftest import S3Access
from tests.gpu_worker.doors import SECRET, Connection, services
from tests.line import Line

PATIENCE_SECONDS = 0.5
MODEL = "tiny.safetensors"
AWAY = "the object store is not reached; no jobs are taken until it is"
BACK = "the object store is reached again"


@pytest.fixture
def content(tiny_checkpoint: Path) -> bytes:
    """A model's."""
    return tiny_checkpoint.read_bytes()


@pytest.fixture
async def store(s3: S3Access, line: Line, content: bytes) -> Blobs:
    """The store with the model; URLs lead through the line."""
    found = Blobs(s3.settings(public_url=f"http://{line.address}"))
    await found.put(MODEL, content)
    return found


@asynccontextmanager
async def working(engine: Engine, folder: Path, upload_patience_seconds: float = 60.0) -> AsyncIterator[Worker]:
    """A worker with an empty cache."""
    async with Transfer(PATIENCE_SECONDS, upload_patience_seconds) as transfer:
        worker = Worker(engine, ModelCache(folder / "cache", 2**30, transfer), transfer, max_jobs=1)
        yield worker
        await worker.stop()


@asynccontextmanager
async def connected(worker: Worker) -> AsyncIterator[Connection]:
    """The queue's end of the worker's stream, when the worker wants a job."""
    async with services() as peers, plain_channel(peers.address) as channel:
        stream = asyncio.create_task(WorkStream(worker, TokenSource(peers.address, SECRET), channel, "worker-1").run())
        connection = await peers.queue.connection()
        await connection.welcome()
        await connection.until_room()
        yield connection
        stream.cancel()
        await asyncio.gather(stream, return_exceptions=True)


def spec_of(store: Blobs, content: bytes) -> worker_pb2.JobSpec:
    """A small job with fresh URLs."""
    job_id = str(uuid4())
    sha256 = hashlib.sha256(content).hexdigest()
    spec = worker_pb2.JobSpec(job_id=job_id, task_type="txt2img", endpoint_name="esd-async-test")
    spec.models.add(
        type="Stable-diffusion",
        name=MODEL,
        url=store.presign_get(MODEL),
        size_bytes=len(content),
        cache_key=sha256,
        sha256=sha256,
    )
    spec.image_uploads.add(name="image_0.png", url=store.presign_put(f"out/{job_id}/image_0.png"))
    spec.param_upload.name = f"{job_id}_param.json"
    spec.param_upload.url = store.presign_put(f"out/{job_id}/{job_id}_param.json")
    payload = {"prompt": "a cat", "steps": 2, "width": 64, "height": 64, "seed": 7, "sampler_name": "Euler"}
    spec.payload.update(payload)
    return spec


def last_want(connection: Connection) -> int:
    return [message.want.num_jobs for message in connection.seen if message.HasField("want")][-1]


async def test_a_job_whose_model_is_cut_off_is_given_back_and_done_when_the_store_is_back(
    engine: Engine, line: Line, store: Blobs, content: bytes, tmp_path: Path
) -> None:
    with capture_logs() as logs:
        async with working(engine, tmp_path) as worker, connected(worker) as connection:
            line.shut(after_bytes=2**20)  # of many
            await connection.assign("lease-1", spec_of(store, content))
            failed = (await connection.until("failed")).event.failed
            assert (failed.postponed, failed.cancelled, failed.nothing_uploaded) == (True, False, True)
            assert failed.reason.startswith(f"{MODEL} cannot be downloaded: the object store does not answer")
            await connection.acknowledge("lease-1")
            assert last_want(connection) == 0
            line.open()
            await connection.until_room()
            spec = spec_of(store, content)
            await connection.assign("lease-2", spec)
            done = (await connection.until("done")).event.done
            picture = await store.get(f"out/{spec.job_id}/image_0.png")
            assert hashlib.sha256(picture).hexdigest() == done.images[0].sha256
    events = [entry["event"] for entry in logs]
    assert (events.count(AWAY), events.count(BACK)) == (1, 1)


async def test_results_are_kept_while_the_store_is_away_and_made_only_once(
    engine: Engine, line: Line, store: Blobs, content: bytes, tmp_path: Path
) -> None:
    async with working(engine, tmp_path) as worker, connected(worker) as connection:
        spec = spec_of(store, content)
        await connection.assign("lease-1", spec)
        await connection.until("started")  # its model is here
        line.shut(after_bytes=1000)  # in the middle of the first request
        await line.gone.wait()
        while not worker_is_paused(connection):
            await connection.read()
        line.open()
        done = (await connection.until("done")).event.done
        picture = await store.get(f"out/{spec.job_id}/image_0.png")
        assert hashlib.sha256(picture).hexdigest() == done.images[0].sha256
        kinds = [message.event.event.WhichOneof("event") for message in connection.seen if message.HasField("event")]
        assert (kinds.count("started"), kinds.count("failed"), kinds.count("done")) == (1, 0, 1)
        await connection.acknowledge("lease-1")
        while last_want(connection) < 1:
            await connection.read()


def worker_is_paused(connection: Connection) -> bool:
    """Whether the worker said that it takes nothing, after it had said that it uploads and would take another job."""
    wants = [message.want.num_jobs for message in connection.seen if message.HasField("want")]
    return wants[-2:] == [1, 0]


async def test_results_that_cannot_be_uploaded_for_too_long_are_given_back(
    engine: Engine, line: Line, store: Blobs, content: bytes, tmp_path: Path
) -> None:
    async with working(engine, tmp_path, PATIENCE_SECONDS) as worker, connected(worker) as connection:
        await connection.assign("lease-1", spec_of(store, content))
        await connection.until("started")
        line.shut()
        failed = (await connection.until("failed")).event.failed
        assert (failed.postponed, failed.nothing_uploaded) == (True, False)
        assert "cannot be uploaded: the object store does not answer" in failed.reason


async def test_results_that_still_wait_for_the_store_when_their_worker_ends_have_not_lost_an_attempt(
    engine: Engine, line: Line, store: Blobs, content: bytes, tmp_path: Path
) -> None:
    async with working(engine, tmp_path) as worker, connected(worker) as connection:
        await connection.assign("lease-1", spec_of(store, content))
        await connection.until("started")
        line.shut(after_bytes=1000)  # in the middle of the first request
        await line.gone.wait()
        stopping = asyncio.create_task(worker.stop())
        failed = (await connection.until("failed")).event.failed
        assert (failed.postponed, failed.cancelled, failed.nothing_uploaded) == (True, False, False)
        assert failed.reason == "the worker ended before the object store had taken the results"
        await stopping


async def test_a_model_that_is_to_be_kept_ready_is_fetched_when_the_store_is_back(
    engine: Engine, line: Line, store: Blobs, content: bytes, tmp_path: Path
) -> None:
    with capture_logs() as logs:
        async with working(engine, tmp_path) as worker, connected(worker) as connection:
            line.shut()
            await connection.preload(*spec_of(store, content).models)
            while (await connection.until("want")).num_jobs > 0:
                pass
            line.open()
            await connection.until_room()
            await connection.assign("lease-1", spec_of(store, content))
            await connection.until("done")
    fetched = [entry for entry in logs if entry["event"] == "model fetched"]
    assert len(fetched) == 1


async def test_a_url_that_has_expired_costs_an_attempt_only_where_a_new_one_would_be_no_better(
    engine: Engine, s3: S3Access, line: Line, store: Blobs, content: bytes, tmp_path: Path
) -> None:
    secret = s3.secret_key_file.read_text().strip()
    signer = Presigner(f"http://{line.address}/{s3.bucket}", s3.region, lambda: Credentials(s3.access_key, secret))
    spec = spec_of(store, content)
    spec.models[0].url = signer.url("GET", MODEL, 60, {}, at=datetime.now(UTC) - timedelta(hours=1))
    expected = f"{MODEL} cannot be downloaded: the object store answers 403, the URL has expired"
    async with working(engine, tmp_path) as worker:
        for age_seconds, postponed in ((0.0, False), (3600.0, True)):
            last: asyncio.Future[worker_pb2.JobEvent] = asyncio.get_running_loop().create_future()
            job = Job(spec, lambda event, last=last: last.set_result(event) if is_last(event) else None)  # type: ignore[misc]
            job.taken_at -= age_seconds
            worker.submit(job)
            failed = (await last).failed
            assert (failed.reason, failed.postponed) == (expected, postponed)


async def test_a_model_that_was_deleted_fails_its_job_by_name(
    engine: Engine, store: Blobs, content: bytes, tmp_path: Path
) -> None:
    spec = spec_of(store, content)
    await store.delete(MODEL)
    async with working(engine, tmp_path) as worker, connected(worker) as connection:
        await connection.assign("lease-1", spec)
        failed = (await connection.until("failed")).event.failed
        assert not failed.postponed
        assert failed.reason == f"{MODEL} cannot be downloaded: the object store answers 404, it has no such object"


async def test_a_job_that_finds_the_disk_unusable_is_for_another_worker(
    engine: Engine, store: Blobs, content: bytes, tmp_path: Path
) -> None:
    async with working(engine, tmp_path) as worker, connected(worker) as connection:
        shutil.rmtree(tmp_path / "cache")
        await connection.assign("lease-1", spec_of(store, content))
        failed = (await connection.until("failed")).event.failed
        assert (failed.declined, failed.nothing_uploaded) == (True, True)
        assert failed.reason == "the worker's disk cannot be used: No such file or directory"


class Refusing(Transfer):
    """The pictures are refused once the description is under way, which takes for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.is_over = asyncio.Event(), False

    async def upload(self, url: str, content: bytes, name: str) -> None:
        if name == "image_0.png":
            await self.begun.wait()
            raise JobError(f"{name} cannot be uploaded: the object store answers 403")
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.is_over = True


async def test_beside_an_upload_that_is_refused_no_other_goes_on(
    engine: Engine, store: Blobs, content: bytes, tmp_path: Path
) -> None:
    last: asyncio.Future[worker_pb2.JobEvent] = asyncio.get_running_loop().create_future()
    async with Refusing() as transfer:
        worker = Worker(engine, ModelCache(tmp_path, 2**30, transfer), transfer, max_jobs=1)
        worker.submit(Job(spec_of(store, content), lambda event: last.set_result(event) if is_last(event) else None))
        assert (await last).failed.reason == "image_0.png cannot be uploaded: the object store answers 403"
        assert transfer.is_over
        await worker.stop()
