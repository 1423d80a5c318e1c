"""Several jobs at once through a worker's own door: results, room, and how the queue is told of it."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from esd.worker.v1 import worker_pb2
from gpu_worker.engine.engine import Engine
from gpu_worker.files.cache import ModelCache
from gpu_worker.files.transfer import Transfer
from gpu_worker.job import Job
from gpu_worker.stream import WorkStream
from gpu_worker.worker import Worker, is_last
from services.common.clients import TokenSource, plain_channel
from tests.gpu_worker.conftest import ObjectStore
from tests.gpu_worker.doors import SECRET, services

MAX_JOBS = 4


@pytest.fixture
async def worker(engine: Engine, transfer: Transfer, tmp_path: Path) -> AsyncIterator[Worker]:
    """A worker that takes several jobs at a time."""
    found = Worker(engine, ModelCache(tmp_path / "cache", 2**30, transfer), transfer, MAX_JOBS)
    yield found
    await found.stop()


def submit(worker: Worker, spec: worker_pb2.JobSpec) -> tuple[Job, asyncio.Future[worker_pb2.JobEvent]]:
    """Starts a job; the future has its last event."""
    last: asyncio.Future[worker_pb2.JobEvent] = asyncio.get_running_loop().create_future()
    job = Job(spec, lambda event: last.set_result(event) if is_last(event) else None)
    worker.submit(job)
    return job, last


async def test_jobs_at_once_leave_each_its_own_results(worker: Worker, store: ObjectStore, make_spec: Any) -> None:
    specs = [make_spec(seed=seed, steps=4 + seed, sampler_name="Euler a") for seed in range(MAX_JOBS)]
    events = await asyncio.gather(*(submit(worker, spec)[1] for spec in specs))
    assert [event.WhichOneof("event") for event in events] == ["done"] * MAX_JOBS
    for seed, spec in enumerate(specs):
        param = json.loads(store.objects[f"{spec.job_id}/{spec.job_id}_param.json"])
        assert json.loads(param["info"])["seed"] == seed
    assert len({store.objects[f"{spec.job_id}/image_0.png"] for spec in specs}) == MAX_JOBS
    assert store.requests.count(("GET", "tiny.safetensors")) == 1


async def test_a_model_that_the_disk_cannot_give_does_not_cost_the_others_that_are_kept_ready(
    worker: Worker, engine: Engine, tmp_path: Path, make_spec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sound,) = make_spec().models
    broken = worker_pb2.ModelFile(name="broken.ckpt", url=sound.url, cache_key="ab" * 32)
    (tmp_path / "cache" / "locks" / broken.cache_key).mkdir()  # no file to lock
    pinned = asyncio.Event()
    monkeypatch.setattr(engine, "pin", lambda files: pinned.set() if files else None)
    worker.preload([broken, sound])
    await asyncio.wait_for(pinned.wait(), 30)


@pytest.mark.slow
async def test_a_short_job_does_not_wait_for_a_long_one_and_cancelling_one_leaves_the_other(
    worker: Worker, make_spec: Any
) -> None:
    long, long_last = submit(worker, make_spec(steps=150, n_iter=2))
    assert (await submit(worker, make_spec(steps=2))[1]).HasField("done")
    assert not long_last.done()
    other = submit(worker, make_spec(steps=100))[1]
    long.cancel()
    assert (await long_last).failed.cancelled
    assert (await other).HasField("done")


@pytest.mark.slow
async def test_a_real_time_job_goes_before_those_that_nobody_waits_for(worker: Worker, make_spec: Any) -> None:
    assert (await submit(worker, make_spec())[1]).HasField("done")
    steps, begun = [0], asyncio.Event()

    def hear(event: worker_pb2.JobEvent) -> None:
        if event.HasField("progress"):
            steps.append(event.progress.step)
            begun.set()

    long = Job(make_spec(steps=150, n_iter=2), hear)
    worker.submit(long)
    await begun.wait()
    urgent = make_spec(steps=100, width=128, height=64)
    urgent.is_real_time = True
    before = steps[-1]
    assert (await submit(worker, urgent)[1]).HasField("done")
    assert steps[-1] - before < 30
    long.cancel()


async def test_room_counts_jobs_and_what_fits_into_one_call(worker: Worker, engine: Engine, make_spec: Any) -> None:
    assert worker.room == engine.max_pixels // (2 * 512 * 512)  # nothing is known of the jobs yet
    assert (await submit(worker, make_spec())[1]).HasField("done")
    assert worker.room == MAX_JOBS  # the last one was small
    jobs = [submit(worker, make_spec(steps=150, n_iter=2)) for _ in range(3)]
    assert worker.room == MAX_JOBS - 3
    for job, _ in jobs:
        job.cancel()
    await asyncio.gather(*(last for _, last in jobs))
    assert worker.room == MAX_JOBS


@pytest.mark.slow
async def test_the_queue_is_asked_for_several_jobs_and_runs_them_together(worker: Worker, make_spec: Any) -> None:
    specs = {f"lease-{index}": make_spec(steps=100, seed=index) for index in range(MAX_JOBS)}
    async with services() as peers, plain_channel(peers.address) as channel:
        stream = WorkStream(worker, TokenSource(peers.address, SECRET), channel, "worker-1")
        task = asyncio.create_task(stream.run())
        connection = await peers.queue.connection()
        await connection.welcome()
        assert (await connection.until("want")).num_jobs == 2
        for lease_id, spec in specs.items():
            await connection.assign(lease_id, spec)
        running: set[str] = set()
        while len(running) < MAX_JOBS:
            running.add((await connection.until("progress")).lease_id)
        assert not any(message.event.event.HasField("done") for message in connection.seen)
        assert {(await connection.until("done")).lease_id for _ in specs} == set(specs)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
