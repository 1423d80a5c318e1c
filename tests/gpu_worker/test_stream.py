"""The Work stream against a real queue service: assignment, events, broken streams, cancellation, drain."""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from esd.inference.v1 import inference_pb2
from gpu_worker.engine import denoise
from gpu_worker.engine.engine import Engine, _Cancel
from gpu_worker.engine.settings import EngineSettings
from gpu_worker.files.cache import ModelCache
from gpu_worker.files.transfer import Transfer
from gpu_worker.stream import Refused, WorkStream
from gpu_worker.worker import Worker
from services.common.clients import TokenSource, plain_channel
from tests.gpu_worker.conftest import ObjectStore
from tests.gpu_worker.doors import PATIENCE_SECONDS, SECRET, Connection, Services, services

LONG = 60  # steps: enough to break a stream in the middle
HALT = 3  # the step that a cancellation finds in progress


class Commands(queue.SimpleQueue[Any]):
    """What the engine's thread is told. `has_cancel` is set when a cancellation is there to be read."""

    def __init__(self) -> None:
        super().__init__()
        self.has_cancel = threading.Event()

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        super().put(item, block, timeout)
        if isinstance(item, _Cancel):
            self.has_cancel.set()


class Halting(Engine):
    """An engine that counts its steps, and is in the one of number HALT until it has been told to cancel a job."""

    def __init__(self) -> None:
        super().__init__(EngineSettings(device="cpu", num_threads=1))
        self._commands = self.commands = Commands()
        self.num_steps = 0
        self.is_halted = asyncio.Event()

    def predict(self, *arguments: Any) -> Any:
        """In the place of the core's own."""
        self.num_steps += 1
        if self.num_steps == HALT:
            self._post(self.is_halted.set)
            assert self.commands.has_cancel.wait(PATIENCE_SECONDS)
        return denoise.predict(*arguments)


@pytest.fixture
async def halting(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Halting]:
    found = Halting()
    monkeypatch.setattr("gpu_worker.engine.core.predict", found.predict)
    found.start()
    await found.ready
    yield found
    await found.stop()


@pytest.fixture
async def peers() -> AsyncIterator[Services]:
    async with services() as found:
        yield found


@asynccontextmanager
async def working(worker: Worker, peers: Services) -> AsyncIterator[asyncio.Task[None]]:
    """The worker's stream, running."""
    async with plain_channel(peers.address) as channel:
        stream = WorkStream(worker, TokenSource(peers.address, SECRET), channel, "worker-1")
        task = asyncio.create_task(stream.run())
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_a_job_is_assigned_runs_and_is_acknowledged(
    worker: Worker, peers: Services, store: ObjectStore, make_spec: Any
) -> None:
    spec = make_spec()
    async with working(worker, peers):
        connection = await peers.queue.connection()
        hello = await connection.welcome()
        assert (hello.worker_id, list(hello.held_leases), hello.device.split(":")[0]) == ("worker-1", [], "cpu")
        await connection.until_room()
        await connection.assign("lease-1", spec)
        await connection.until("started")
        assert (await connection.until("progress")).lease_id == "lease-1"
        done = await connection.until("done")
        assert [image.name for image in done.event.done.images] == ["image_0.png"]
        await connection.acknowledge("lease-1")
        wants = [request.want for request in connection.seen if request.HasField("want")]
        assert any(want.num_jobs == 0 for want in wants)
        assert list(wants[-1].warm_models)
        await connection.assign("lease-2", make_spec())
        await connection.until("done")
    assert f"{spec.job_id}/image_0.png" in store.objects


async def test_a_job_outlives_a_broken_stream_and_is_done_once(
    worker: Worker, peers: Services, store: ObjectStore, make_spec: Any
) -> None:
    spec = make_spec(steps=LONG)
    async with working(worker, peers):
        first = await peers.queue.connection()
        await first.welcome()
        await first.until_room()
        await first.assign("lease-1", spec)
        await first.until("progress")
        first.sever()
        second = await peers.queue.connection()
        assert list((await second.welcome("lease-1")).held_leases) == ["lease-1"]
        await second.until("started")  # told again: the first stream may have lost it
        done = await second.until("done")
        second.sever()  # before the acknowledgement
        third = await peers.queue.connection()
        assert list((await third.welcome("lease-1")).held_leases) == ["lease-1"]
        assert await third.until("done") == done
        await third.acknowledge("lease-1")
        await third.until_room()
        third.sever()
        fourth = await peers.queue.connection()
        assert list((await fourth.welcome()).held_leases) == []
        await fourth.until_room()
        assert not any(message.HasField("event") for message in fourth.seen)
    assert store.requests.count(("PUT", f"{spec.job_id}/image_0.png")) == 1


async def test_a_job_whose_lease_was_lost_stops_without_results(
    worker: Worker, peers: Services, store: ObjectStore, make_spec: Any
) -> None:
    spec = make_spec(steps=150, n_iter=2)
    async with working(worker, peers):
        first = await peers.queue.connection()
        await first.welcome()
        await first.until_room()
        await first.assign("lease-1", spec)
        await first.until("progress")
        first.sever()
        second = await peers.queue.connection()
        await second.welcome()  # keeps nothing
        await second.until_room()
        second.sever()
        third = await peers.queue.connection()
        assert list((await third.welcome()).held_leases) == []
    assert f"{spec.job_id}/image_0.png" not in store.objects


async def told_to_stop(connection: Connection, peers: Services) -> Connection:
    """As its owner's cancellation does, and the end of its time."""
    await connection.send(cancel=inference_pb2.Cancel(lease_id="lease-1"))
    assert (await connection.until("failed")).event.failed.cancelled
    return connection


async def forgotten(connection: Connection, peers: Services) -> Connection:
    """Its lease was given to another meanwhile."""
    connection.sever()
    again = await peers.queue.connection()
    await again.welcome()  # keeps nothing
    return again


@pytest.mark.parametrize("stopped", [told_to_stop, forgotten])
async def test_a_job_that_is_to_stop_makes_no_step_but_the_one_in_progress_and_the_worker_goes_on(
    halting: Halting, transfer: Transfer, tmp_path: Path, peers: Services, make_spec: Any, stopped: Any
) -> None:
    worker = Worker(halting, ModelCache(tmp_path / "cache", 2**30, transfer), transfer, max_jobs=1)
    async with working(worker, peers):
        connection = await peers.queue.connection()
        await connection.welcome()
        await connection.until_room()
        await connection.assign("lease-1", make_spec(steps=150, n_iter=2))
        await connection.until("started")
        await asyncio.wait_for(halting.is_halted.wait(), PATIENCE_SECONDS)
        after = await stopped(connection, peers)
        await after.until_room()
        assert halting.num_steps == HALT
        await after.assign("lease-2", make_spec(steps=2))
        await after.until("done")
        assert halting.num_steps == HALT + 2
    told = [message.event for message in (*connection.seen, *after.seen) if message.event.lease_id == "lease-1"]
    assert max(leased.event.progress.step for leased in told) <= HALT


async def test_a_drained_worker_finishes_its_job_and_leaves(worker: Worker, peers: Services, make_spec: Any) -> None:
    async with plain_channel(peers.address) as channel:
        stream = WorkStream(worker, TokenSource(peers.address, SECRET), channel, "worker-1")
        task = asyncio.create_task(stream.run())
        connection = await peers.queue.connection()
        await connection.welcome()
        await connection.until_room()
        await connection.assign("lease-1", make_spec(steps=20))
        await connection.until("progress")
        stream.drain()
        await connection.until("done")
        assert not task.done()
        await connection.acknowledge("lease-1")
        while await connection.read() is not grpc.aio.EOF:
            pass
        await asyncio.wait_for(task, 30)
        assert connection.seen[-1].WhichOneof("message") != "want" or connection.seen[-1].want.num_jobs == 0


async def test_a_worker_whose_secret_is_forgotten_gives_up_and_one_without_a_queue_does_not(
    worker: Worker, peers: Services
) -> None:
    async with working(worker, peers) as task:
        connection = await peers.queue.connection()
        await connection.welcome()
        connection.sever()
        await (await peers.queue.connection()).welcome()  # it came back
        assert not task.done()
    peers.identity.knows = False
    async with working(worker, peers) as task:
        with pytest.raises(Refused, match="the secret is not known"):
            await asyncio.wait_for(task, 30)


async def test_a_worker_that_is_drained_before_its_welcome_leaves_at_once(worker: Worker, peers: Services) -> None:
    async with plain_channel(peers.address) as channel:
        stream = WorkStream(worker, TokenSource(peers.address, SECRET), channel, "worker-1")
        task = asyncio.create_task(stream.run())
        connection = await peers.queue.connection()
        await connection.until("hello")  # which the queue does not answer
        stream.drain()
        await asyncio.wait_for(task, 30)
        connection.sever()


async def test_models_that_are_to_be_kept_ready_are_in_memory_before_a_job_comes(
    worker: Worker, peers: Services, make_spec: Any
) -> None:
    (model,) = make_spec().models
    gone = inference_pb2.Preload(models=[model]).models[0]
    gone.cache_key, gone.url = "00" * 32, model.url + "-is-not-there"
    async with working(worker, peers):
        connection = await peers.queue.connection()
        await connection.welcome()
        await connection.preload(gone, model)
        while model.cache_key not in (await connection.until("want")).warm_models:  # other tests' models may be too
            pass
        await connection.assign("lease-1", make_spec())
        await connection.until("done")
        connection.sever()
        again = await peers.queue.connection()
        await again.welcome()
        await again.until_room()  # what is to be kept ready is said anew, or nothing is
