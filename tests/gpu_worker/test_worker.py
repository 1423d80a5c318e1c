"""A worker's jobs beside each other: who goes first, and what becomes of one that comes at the worker's end."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from esd.worker.v1 import worker_pb2
from gpu_worker import painting
from gpu_worker.company import Company
from gpu_worker.engine.core import NO_MEMORY
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.run import Produced
from gpu_worker.engine.settings import EngineSettings
from gpu_worker.files.cache import ModelCache
from gpu_worker.files.transfer import Transfer
from gpu_worker.job import Job, NoMemory
from gpu_worker.models import tiny
from gpu_worker.worker import Worker, is_last
from services.common.payloads import check
from tests.gpu_worker import tiny_esrgan
from tests.gpu_worker.conftest import as_cached
from tests.gpu_worker.driving import txt2img_of
from tests.pictures import encoded, noise


async def test_a_picture_that_somebody_waits_for_is_enlarged_while_another_job_waits_for_room(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    tiny.write(tmp_path / "other.safetensors", seed=2)
    tiny_esrgan.write(tmp_path / "x.pth")
    checkpoints = as_cached(tiny_checkpoint), as_cached(tmp_path / "other.safetensors")
    image = noise(16, 16)
    request: Any = check("extra-single-image", {"image": encoded(image), "upscaler_1": "x"}, "job")
    engine = Engine(EngineSettings(device="cpu", num_threads=1, model_bytes=1))  # room for one checkpoint at a time
    engine.start()
    await engine.ready
    begun = [asyncio.Event(), asyncio.Event()]
    long = txt2img_of(width=64, height=64, steps=150, n_iter=4)
    runs = []
    for number in range(2):
        run = engine.run(str(number), long, [checkpoints[number]], begun[number].set, lambda _: None)
        runs.append(asyncio.create_task(run))
        if number == 0:
            await begun[0].wait()
    await asyncio.sleep(0)  # the second one is on its way
    job = Job(worker_pb2.JobSpec(is_real_time=True), lambda _: None)
    (larger,) = await painting.enlarged(engine, job, request, [as_cached(tmp_path / "x.pth", "ESRGAN")], [image])
    assert isinstance(larger, Image.Image)
    assert not begun[1].is_set()
    for run in runs:
        run.cancel()
    assert all(isinstance(end, asyncio.CancelledError) for end in await asyncio.gather(*runs, return_exceptions=True))
    await engine.stop()


async def test_a_job_that_comes_while_the_worker_stops_is_given_back(worker: Worker, make_spec: Any) -> None:
    ended: asyncio.Future[worker_pb2.JobEvent] = asyncio.get_running_loop().create_future()
    await worker.stop()
    worker.submit(Job(make_spec(), ended.set_result))
    failed = (await ended).failed
    assert (failed.cancelled, failed.reason) == (True, "the worker ended")


class Small(Engine):
    """Has memory for so many runs at a time."""

    def __init__(self, num_fitting: int) -> None:
        super().__init__(EngineSettings(device="cpu", num_threads=1))
        self.num_fitting, self.num_runs = num_fitting, 0

    async def run(self, *about: Any, **more: Any) -> Produced:
        self.num_runs += 1
        try:
            if self.num_runs > self.num_fitting:
                raise NoMemory(NO_MEMORY)
            return await super().run(*about, **more)
        finally:
            self.num_runs -= 1


@pytest.mark.parametrize("num_fitting", [0, 1])
async def test_a_job_that_does_not_fit_the_memory_beside_another_is_done_alone_and_no_others_are_taken_meanwhile(
    transfer: Transfer, tmp_path: Path, make_spec: Any, num_fitting: int
) -> None:
    engine = Small(num_fitting)
    engine.start()
    await engine.ready
    worker = Worker(engine, ModelCache(tmp_path, 2**30, transfer), transfer, max_jobs=16)
    is_full, ends = asyncio.Event(), list[asyncio.Future[worker_pb2.JobEvent]]()

    def submit(**payload: Any) -> asyncio.Event:
        ended: asyncio.Future[worker_pb2.JobEvent] = asyncio.get_running_loop().create_future()
        begun = asyncio.Event()
        ends.append(ended)

        def hear(event: worker_pb2.JobEvent) -> None:
            if event.HasField("started"):
                begun.set()
            if is_last(event):
                ended.set_result(event)

        worker.submit(Job(make_spec(**payload), hear))
        return begun

    first = submit(steps=60)
    if num_fitting:
        await first.wait()
        alone = submit(steps=60)
        worker.on_change = lambda: is_full.set() if worker.room == 0 else None
        await is_full.wait()
        await alone.wait()
        submit()  # it was on its way
    for ended in ends:
        event = await ended
        assert event.failed.reason == ("" if num_fitting else NO_MEMORY)
    assert worker.room > 0
    await worker.stop()
    await engine.stop()


async def test_who_had_company_in_the_engine_is_told_so_also_when_that_has_left() -> None:
    company = Company(lambda: None)
    async with company.joined() as first_had:
        assert not first_had()
        async with company.joined() as second_had:
            pass
        assert first_had()
        assert second_had()
    async with company.joined() as third_had:
        assert not third_had()
