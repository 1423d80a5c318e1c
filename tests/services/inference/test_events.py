"""What a watcher of a job is told, wherever its worker is."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from esd.inference.v1 import inference_pb2 as pb
from esd.inference.v1 import inference_pb2_grpc
from esd.worker.v1 import worker_pb2
from services.common.database import Database
from services.common.notifications import Notifications
from services.common.viewer import Viewer
from services.inference.channels import CHANNELS
from services.inference.domain import Inference
from services.inference.servicer import InferenceServicer
from services.inference.store import JobStore
from services.inference.submitting.priorities import Priorities
from services.inference.views import Views
from services.inference.watching.events import Events, Preview, Queued, Step
from services.inference.watching.hub import Hub
from services.inference.watching.store import WatchStore
from tests.services.inference.conftest import Service
from tests.serving import Metadata, serving

pytestmark = pytest.mark.timeout(60)


class Watcher:
    """A client's end of the stream."""

    def __init__(self, call: Any) -> None:
        self.call = call

    async def read(self) -> Any:
        """The next event that is no ping: (its name, the event)."""
        message = await self.call.read()
        assert message is not grpc.aio.EOF
        return str(message.WhichOneof("event")), getattr(message, message.WhichOneof("event"))

    async def until(self, name: str) -> Any:
        """The next event of this name."""
        while (event := await self.read())[0] != name:
            pass
        return event[1]

    async def names(self) -> list[str]:
        """The names of all events up to the end of the stream."""
        names = []
        while (message := await self.call.read()) is not grpc.aio.EOF:
            names.append(str(message.WhichOneof("event")))
        return names


def watch(service: Service, job_id: str, jobs: Any = None, metadata: Metadata | None = None) -> Watcher:
    request = pb.WatchInferenceJobRequest(job_id=job_id)
    return Watcher((jobs or service.jobs).WatchInferenceJob(request, metadata=metadata or service.user()))


@dataclass
class Replica:
    """A second inference service on the same database, from outside and inside."""

    jobs: Any
    events: Events


@asynccontextmanager
async def another_replica(service: Service, database_url: str) -> AsyncIterator[Replica]:
    """The replica, running."""
    database, notifications = Database(database_url), Notifications()
    stopping = asyncio.Event()
    hub, store = Hub(WatchStore(database), notifications), JobStore(database)
    jobs = Inference(store, service.blobs, None, notifications, None, Priorities({}), stopping)  # type: ignore[arg-type]
    views = Views(service.blobs)
    tasks = [
        asyncio.create_task(database.listen(CHANNELS, notifications.on_notify)),
        asyncio.create_task(hub.run(stopping)),
    ]

    events = Events(jobs, views, hub)

    def add(server: grpc.aio.Server) -> None:
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceServicer(jobs, views, events, None), server)

    async with serving(add, service.tokens.verifier("inference")) as channel:
        yield Replica(inference_pb2_grpc.InferenceServiceStub(channel), events)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await database.dispose()


def step(number: int) -> dict[str, Any]:
    return {"progress": worker_pb2.JobProgress(step=number, num_steps=4)}


def preview(jpeg: bytes) -> dict[str, Any]:
    return {"preview": worker_pb2.JobPreview(jpeg=jpeg)}


async def watched(worker: Any) -> Any:
    """The service's next word, which says that somebody watches or nobody does."""
    message = await worker.read()
    assert message.WhichOneof("message") == "watched"
    return message.watched


async def test_a_watcher_hears_of_a_jobs_life_from_its_creation_to_its_end(service: Service) -> None:
    receipt = await service.create()
    watcher = watch(service, receipt.id)
    assert (await watcher.read())[0] == "created"
    await service.upload(receipt)
    await service.start(receipt.id)
    assert (await watcher.until("queued")).position == 1
    async with service.worker() as worker:
        assign = await worker.take()
        assert (await watched(worker)) == pb.Watched(lease_id=assign.lease_id, is_watched=True)
        await worker.begin(assign)
        await watcher.until("started")
        await worker.tell(assign.lease_id, **step(1))
        assert await watcher.read() == ("step", pb.JobStep(step=1, num_steps=4))
        await worker.tell(assign.lease_id, **preview(b"a small picture"))
        assert await watcher.read() == ("preview", pb.JobPreview(jpeg=b"a small picture"))
        await worker.finish(assign)
    image = (await watcher.read())[1]
    assert (image.index, image.name) == (0, "image_0.png")
    assert (await service.http.get(image.url)).status_code == 200
    assert await watcher.names() == ["done"]


async def test_a_watcher_on_another_replica_hears_the_same(service: Service, database_url: str) -> None:
    job_id = await service.started()
    async with another_replica(service, database_url) as replica, service.worker() as worker:
        assign = await worker.take()
        await worker.begin(assign)
        await worker.tell(assign.lease_id, **step(1))
        watcher = watch(service, job_id, replica.jobs)
        assert (await watched(worker)).is_watched
        assert (await watcher.until("step")).step == 1  # told before anybody watched
        await worker.tell(assign.lease_id, **preview(bytes(20_000)))
        assert len((await watcher.until("preview")).jpeg) == 20_000
        await worker.tell(assign.lease_id, **step(2))
        assert (await watcher.until("step")).step == 2
        await worker.finish(assign)
        assert await watcher.names() == ["image", "done"]


async def test_a_watcher_that_comes_again_gets_the_present_state_and_goes_on(service: Service) -> None:
    job_id = await service.started()
    async with service.worker() as worker:
        assign = await worker.take()
        await worker.begin(assign)
        first = watch(service, job_id)
        await first.until("started")
        assert (await watched(worker)).is_watched
        await worker.tell(assign.lease_id, **step(3))
        await first.until("step")
        first.call.cancel()
        assert not (await watched(worker)).is_watched
        second = watch(service, job_id)
        assert [await second.read(), await second.read()] == [
            ("started", pb.JobStarted()),
            ("step", pb.JobStep(step=3, num_steps=4)),
        ]
        assert (await watched(worker)).is_watched
        await worker.finish(assign)
        assert await second.names() == ["image", "done"]
    assert await watch(service, job_id).names() == ["image", "done"]


async def test_a_worker_that_comes_back_is_told_again_what_is_watched(service: Service) -> None:
    job_id = await service.started()
    watcher = watch(service, job_id)
    async with service.worker() as worker:
        assign = await worker.take()
        await worker.begin(assign)
        await watcher.until("started")
        async with service.worker(held=[assign.lease_id]) as again:
            assert (await watched(again)) == pb.Watched(lease_id=assign.lease_id, is_watched=True)
            await again.begin(assign)
            await again.tell(assign.lease_id, **step(4))
            assert (await watcher.until("step")).step == 4


async def test_a_job_that_lost_its_worker_is_queued_again_for_its_watcher(service: Service) -> None:
    job_id = await service.started()
    watcher = watch(service, job_id)
    async with service.worker("first") as first:
        lost = await first.take()
        await first.begin(lost)
        await watcher.until("started")
        await first.leave()
        assert (await watcher.until("queued")).position == 1
    async with service.worker("second") as second:
        await second.begin(await second.take())
        await watcher.until("started")


async def test_the_place_in_the_queue_and_the_estimate_are_told(service: Service) -> None:
    done, _, second = [await service.started() for _ in range(3)]
    watcher = watch(service, second)
    place = await watcher.until("queued")
    assert (place.position, place.HasField("estimated_start_time")) == (3, False)
    async with service.worker() as worker:
        assign = await worker.take()
        assert assign.spec.job_id == done
        await worker.begin(assign)
        await worker.finish(assign)
        while (place := await watcher.until("queued")).position != 2 or not place.HasField("estimated_start_time"):
            pass
        assert place.estimated_start_time.string_value > (await service.get(second)).create_time


async def test_a_failed_and_a_deleted_job_end_the_stream_with_the_reason(service: Service) -> None:
    job_id = await service.started()
    watcher = watch(service, job_id)
    await watcher.until("queued")
    request = pb.DeleteInferenceJobsRequest(inference_id_list=[job_id])
    await service.jobs.DeleteInferenceJobs(request, metadata=service.user())
    assert "deleted" in (await watcher.until("failed")).reason
    assert await watcher.names() == []


async def test_a_slow_watcher_gets_the_latest_and_holds_up_nobody(service: Service, database_url: str) -> None:
    job_id = await service.started()
    async with another_replica(service, database_url) as replica, service.worker() as worker:
        slow = replica.events.watch(job_id, Viewer("ann", []))
        assert isinstance(await anext(slow), Queued)
        fast = watch(service, job_id, replica.jobs)
        assign = await worker.take()
        assert (await watched(worker)).is_watched
        await worker.begin(assign)
        for number in range(1, 5):
            await worker.tell(assign.lease_id, **preview(b"%d" % number))
            await worker.tell(assign.lease_id, **step(number))
            while (await fast.until("step")).step != number:
                pass
        told = []
        while not isinstance(event := await anext(slow), Preview):
            told.append(event)
        assert [one for one in (*told, event) if isinstance(one, Step | Preview)] == [Step(4, 4), Preview(b"4")]
        await worker.finish(assign)
        assert (await fast.names())[-2:] == ["image", "done"]
        assert [type(event).__name__ async for event in slow][-2:] == ["Image", "Done"]


async def test_somebody_elses_job_and_an_unknown_one_cannot_be_watched(service: Service) -> None:
    job_id = await service.started()
    for metadata, wanted, code in [
        (service.user("bob"), job_id, grpc.StatusCode.PERMISSION_DENIED),
        (service.user(), "nonsense", grpc.StatusCode.NOT_FOUND),
    ]:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await watch(service, wanted, metadata=metadata).read()
        assert caught.value.code() is code
    assert (await watch(service, job_id, metadata=service.user("bob", "user:all")).read())[0] == "queued"


async def test_watchers_are_sent_away_when_the_service_stops(service: Service, stopping: asyncio.Event) -> None:
    watcher = watch(service, await service.started())
    await watcher.until("queued")
    stopping.set()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await watcher.names()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
