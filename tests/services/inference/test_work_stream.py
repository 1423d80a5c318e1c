import asyncio
import hashlib
import json
import math
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import UUID, uuid4

import grpc
import psycopg
import pytest
from google.protobuf.json_format import MessageToDict
from sqlalchemy import text

from esd.inference.v1 import inference_pb2 as pb
from esd.worker.v1 import worker_pb2
from services.common.database import Database
from services.common.errors import Unavailable
from services.common.leftovers import LeftoverStore
from services.common.tasks import Background
from services.inference.queue.domain import Limits, Queue, WorkerStream
from services.inference.queue.results import ResultObject, Results
from services.inference.queue.store import LeaseStore, Seen
from services.inference.rows import LAST_ATTEMPT, MAX_LOST
from services.inference.store import JobStore
from services.inference.upkeep.outputs import Outputs
from tests.services.inference.conftest import LARGE, PNG, SHA256, ScriptedWorker, Service, ended_with

pytestmark = pytest.mark.timeout(60)


def kind(message: Any) -> str:
    return str(message.WhichOneof("message"))


async def test_a_waiting_worker_gets_a_job_as_soon_as_it_is_queued(service: Service) -> None:
    async with service.worker() as worker:
        await worker.want()
        job_id = await service.started()
        spec = (await worker.read()).assign.spec
        assert (spec.job_id, spec.is_real_time) == (job_id, False)


async def test_a_worker_gets_as_many_jobs_as_it_wants_and_only_of_its_endpoint(service: Service) -> None:
    ids = [await service.started() for _ in range(3)]
    async with service.worker("other", endpoint_id=service.world.add_endpoint("Real-time")) as other:
        await other.want(5)
        async with service.worker() as worker:
            await worker.want(2)
            assert [(await worker.read()).assign.spec.job_id for _ in range(2)] == ids[:2]
            await worker.want(1)
            assert (await worker.read()).assign.spec.job_id == ids[2]


async def test_a_job_whose_worker_is_lost_is_finished_once_by_another(service: Service) -> None:
    job_id = await service.started()
    async with service.worker("first") as first:
        lost = await first.take()
        await first.begin(lost)
    async with service.worker("second") as second:
        assign = await second.take()
        assert assign.spec.job_id == job_id
        assert assign.lease_id != lost.lease_id
        assert assign.spec.payload == lost.spec.payload  # the seed too
        assert kind(await second.finish(assign)) == "acknowledge"
    job = await service.get(job_id)
    assert job.status == "succeed"
    assert assign.lease_id in job.img_presigned_urls[0]


async def test_a_worker_that_comes_back_goes_on_with_what_it_holds(service: Service) -> None:
    job_id = await service.started()
    async with service.worker() as worker:
        assign = await worker.take()
    async with service.worker(held=[assign.lease_id]) as again:
        assert again.kept == [assign.lease_id]
        assert kind(await again.finish(assign)) == "acknowledge"
    assert (await service.get(job_id)).status == "succeed"


async def test_a_job_that_a_worker_does_not_know_of_is_given_again(service: Service) -> None:
    job_id = await service.started()
    async with service.worker() as worker:
        before = await worker.take()
        async with service.worker() as again:  # the same worker, while its old stream is not known to be broken
            assert again.kept == []
            assign = await again.take()
            assert (assign.spec.job_id, assign.lease_id != before.lease_id) == (job_id, True)


async def test_done_under_a_lost_lease_counts_for_nothing_and_leaves_nothing(service: Service) -> None:
    job_id = await service.started()
    async with service.worker("slow") as slow:
        lost = await slow.take()
    async with service.worker("quick") as quick:
        assign = await quick.take()
        async with service.worker("slow", held=[lost.lease_id]) as back:
            assert back.kept == []
            answer = await back.finish(lost)
            assert answer.cancel.lease_id == lost.lease_id
        assert kind(await quick.finish(assign)) == "acknowledge"
    job = await service.get(job_id)
    assert assign.lease_id in job.img_presigned_urls[0]
    await until(service, f"out/{job_id}/result/{lost.lease_id}/", gone=True)
    assert len(await service.blobs.find(f"out/{job_id}/")) == 2


async def heard(worker: ScriptedWorker) -> None:
    """Waits until the service has taken what the worker said; fails when it said something else meanwhile."""
    unknown = str(uuid4())
    await worker.tell(unknown, failed={"reason": "of a lease that nobody holds"})
    assert (await worker.read()).cancel.lease_id == unknown


async def test_a_job_that_kills_its_workers_fails_and_takes_no_other_with_it(service: Service) -> None:
    ids = [await service.started() for _ in range(3)]
    deadly = ids[1]
    for attempt in range(MAX_LOST - 1):
        async with service.worker(f"killed {attempt}") as worker:
            await worker.want(8)
            for _ in ids:
                await worker.begin((await worker.read()).assign)
            await heard(worker)
    alone: list[str] = []
    while len(alone) < len(ids):
        async with service.worker(f"after {len(alone)}") as worker:
            await worker.want(8)
            while len(alone) < len(ids):
                assign = (await worker.read()).assign
                await worker.begin(assign)
                await heard(worker)
                alone.append(assign.spec.job_id)
                if alone[-1] == deadly:
                    break
                assert kind(await worker.finish(assign)) == "acknowledge"
    reason = (await service.ended(deadly)).sagemaker_raw.string_value
    assert reason == "the worker was lost while it had this job, 3 times"
    assert [(await service.get(job_id)).status for job_id in ids] == ["succeed", "failed", "succeed"]


async def test_a_job_that_kills_its_workers_before_it_starts_fails_too_and_alone(service: Service) -> None:
    ids = [await service.started() for _ in range(2)]
    for attempt in range(MAX_LOST - 1):
        async with service.worker(f"killed {attempt}") as worker:
            await worker.want(8)
            for _ in ids:
                await worker.read()
    async with service.worker("alone") as worker:
        await worker.want(8)
        assert (await worker.read()).assign.spec.job_id == ids[0]
    reason = (await service.ended(ids[0])).sagemaker_raw.string_value
    assert reason == "the worker was lost while it had this job, 3 times"
    async with service.worker("after") as worker:
        assert kind(await worker.finish(await worker.take())) == "acknowledge"
    assert (await service.get(ids[1])).status == "succeed"


async def test_a_job_on_its_last_attempt_waits_for_what_its_worker_holds_unless_that_wants_no_more(
    service: Service, database_url: str
) -> None:
    async with service.worker() as worker, service.worker("other") as other:
        await service.started()
        before = await worker.take()
        ids = [await service.started() for _ in range(3)]
        async with await psycopg.AsyncConnection.connect(database_url.replace("+psycopg", "")) as connection:
            await connection.execute("UPDATE job SET num_lost = %s WHERE id <> %s", (LAST_ATTEMPT, ids[1]))
        await worker.want(8)
        assert kind(await worker.finish(before)) == "acknowledge"
        alone = (await worker.read()).assign
        assert alone.spec.job_id == ids[0]
        assert kind(await worker.finish(alone)) == "acknowledge"
        behind = (await worker.read()).assign
        assert behind.spec.job_id == ids[1]
        await worker.want(0)
        assert (await other.take()).spec.job_id == ids[2]


async def test_a_worker_gets_other_jobs_when_the_one_that_it_would_have_run_alone_is_cancelled(
    service: Service, database_url: str
) -> None:
    async with (
        service.worker() as worker,
        await psycopg.AsyncConnection.connect(database_url.replace("+psycopg", ""), autocommit=True) as connection,
    ):
        await service.started()
        await worker.take()
        alone, other = [await service.started() for _ in range(2)]
        await connection.execute("UPDATE job SET num_lost = %s WHERE id = %s", (LAST_ATTEMPT, alone))
        await worker.want(8)
        claimed = "SELECT FROM job WHERE id = %s AND lease_id IS NOT NULL"
        async with asyncio.timeout(60):  # nothing tells
            while not (await connection.execute(claimed, (alone,))).rowcount:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await service.jobs.CancelInferenceJob(pb.CancelInferenceJobRequest(job_id=alone), metadata=service.user())
        assert kind(await worker.read()) == "cancel"
        assert (await worker.read()).assign.spec.job_id == other


async def until(service: Service, prefix: str, *, gone: bool) -> None:
    """Waits for what is done to objects in the background, of which nothing tells."""
    async with asyncio.timeout(60):
        while bool(await service.blobs.find(prefix)) == gone:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_done_told_twice_is_acknowledged_twice_and_keeps_the_result(service: Service) -> None:
    job_id = await service.started()
    async with service.worker() as worker:
        assign = await worker.take()
        assert kind(await worker.finish(assign)) == "acknowledge"
        assert kind(await worker.finish(assign)) == "acknowledge"
    assert len(await service.blobs.find(f"out/{job_id}/")) == 2


async def test_results_wait_on_the_same_stream_while_the_object_store_is_away(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def digest(*_: Any) -> Any:
        monkeypatch.undo()
        raise Unavailable("the object store does not answer")

    job_id = await service.started()
    async with service.worker() as worker:
        assign = await worker.take()
        monkeypatch.setattr(service.blobs, "digest", digest)
        assert kind(await worker.finish(assign)) == "acknowledge"
    assert (await service.get(job_id)).status == "succeed"


async def test_done_told_twice_at_once_is_recorded_once_and_keeps_the_result(
    service: Service, database_url: str
) -> None:
    job_id = await service.started()
    async with service.worker() as worker:
        assign = await worker.take()
        for place in [*assign.spec.image_uploads, assign.spec.param_upload]:
            (await service.http.put(place.url, content=PNG)).raise_for_status()
        database, background = Database(database_url), Background()
        leases, leftovers = LeaseStore(database), LeftoverStore(database)
        outputs = Outputs(JobStore(database), service.blobs)
        queue = Queue(leases, service.blobs, leftovers, outputs, background, Limits())
        told = [ResultObject(name, len(PNG), SHA256) for name in ("image_0.png", f"{job_id}_param.json")]
        results = Results([told[0]], told[1], {})
        stream = WorkerStream(UUID(service.endpoint_id), "w", uuid4())
        tellings = (queue.succeed(stream, UUID(assign.lease_id), results) for _ in range(2))
        assert await asyncio.gather(*tellings) == [True, True]
        await background.stop()
        await database.dispose()
    assert len(await service.blobs.find(f"out/{job_id}/")) == 2


class Looking(LeaseStore):
    """Counts the looks at the workers, until one is taken for lost."""

    num_looks = 0

    async def seen(self) -> list[Seen]:
        self.num_looks += 1
        return await super().seen()

    async def reap(self, lost: list[Seen]) -> int:
        if lost:
            raise StopAsyncIteration
        return await super().reap(lost)


async def test_a_worker_is_lost_by_looks_without_a_renewal_and_not_by_the_hours_that_a_machine_slept(
    service: Service, database_url: str
) -> None:
    database, background = Database(database_url), Background()
    store = Looking(database)
    outputs = Outputs(JobStore(database), service.blobs)
    limits = Limits(lease_seconds=0.5, renew_seconds=0.1)
    leftovers = LeftoverStore(database)
    queue = Queue(store, service.blobs, leftovers, outputs, background, limits)
    await queue.welcome(UUID(service.endpoint_id), "w", [], "cpu", "0")
    async with database.transaction() as session:
        await session.execute(text("UPDATE worker SET last_seen = last_seen - interval '8 hours'"))
    with pytest.raises(StopAsyncIteration):
        await queue.run()
    assert store.num_looks == 6
    await database.dispose()


async def test_the_urls_of_a_worker_live_a_day(service: Service) -> None:
    receipt = await service.create()
    await service.upload(receipt, **LARGE)  # too long for the row, so it goes by URL too
    await service.start(receipt.id)
    async with service.worker() as worker:
        spec = (await worker.take()).spec
    urls = [spec.payload_url, spec.param_upload.url, spec.image_uploads[0].url, spec.models[0].url]
    assert [parse_qs(urlsplit(url).query)["X-Amz-Expires"] for url in urls] == [["86400"]] * 4


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"upload": False}, "is not in the object store"),
        ({"size": 3}, "bytes in the object store instead of 3"),
        ({"sha256": "00"}, "in the object store instead of 00"),
        ({"content": b"GIF", "size": 3, "sha256": hashlib.sha256(b"GIF").hexdigest()}, "image_0.png is no PNG"),
    ],
)
async def test_results_that_are_not_as_told_fail_the_job_and_are_removed(
    service: Service, options: Any, reason: str
) -> None:
    job_id = await service.started()
    async with service.worker() as worker:
        assert kind(await worker.finish(await worker.take(), **options)) == "acknowledge"
    job = await service.get(job_id)
    assert job.status == "failed"
    assert reason in job.sagemaker_raw.string_value
    await until(service, f"out/{job_id}/", gone=True)


async def test_a_failure_is_shown_with_the_workers_reason(service: Service) -> None:
    job_id = await service.started()
    async with service.worker() as worker:
        assign = await worker.take()
        await worker.tell(assign.lease_id, failed={"reason": "v1-5.safetensors is truncated"})
        assert (await worker.read()).acknowledge.lease_id == assign.lease_id
    job = MessageToDict(await service.get(job_id))
    assert (job["status"], job["sagemakerRaw"]) == ("failed", "v1-5.safetensors is truncated")
    assert job["completeTime"]
    assert "image_names" not in job


async def test_a_reason_that_nobody_could_keep_fails_its_job_and_leaves_the_stream(service: Service) -> None:
    job_id = await service.started()
    async with service.worker() as worker:
        assign = await worker.take()
        await worker.tell(assign.lease_id, failed={"reason": "no layer \0\x1b[2J" + "x" * 100_000})
        assert (await worker.read()).acknowledge.lease_id == assign.lease_id
    reason = MessageToDict(await service.get(job_id))["sagemakerRaw"]
    assert reason.startswith("no layer \\x00\\x1b[2Jxxx")
    assert len(reason) == 4000


async def test_a_job_that_workers_stop_by_themselves_goes_to_another_however_often(service: Service) -> None:
    job_id = await service.started()
    for number in range(MAX_LOST):
        async with service.worker(f"ending {number}") as ending:
            assign = await ending.take()
            await ending.begin(assign)
            await ending.tell(assign.lease_id, failed={"reason": "the worker ended", "cancelled": True})
            while (said := kind(await ending.read())) != "acknowledge":
                assert said == "cancel"  # the lease is gone, and that may be said first
    async with service.worker("last") as last:
        assert (await last.take()).spec.job_id == job_id


async def test_a_job_for_which_a_worker_has_no_room_goes_to_another(service: Service) -> None:
    job_id = await service.started()
    async with service.worker("full") as full, service.worker("other") as other:
        assign = await full.take()
        await full.want()
        await full.tell(assign.lease_id, failed={"reason": "the worker's disk is full", "declined": True})
        assert kind(await full.read()) == "acknowledge"
        assert kind(await other.finish(await other.take())) == "acknowledge"
    assert (await service.get(job_id)).status == "succeed"


async def test_a_claim_that_meets_only_a_locked_job_gets_it_when_the_lock_goes(
    service: Service, database_url: str
) -> None:
    job_id = await service.started()
    async with (
        service.worker() as worker,
        await psycopg.AsyncConnection.connect(database_url.replace("+psycopg", "")) as holder,
    ):
        await holder.execute("SELECT FROM job FOR UPDATE")
        await worker.want()
        answer = asyncio.ensure_future(worker.read())
        assert not (await asyncio.wait([answer], timeout=0.5))[0]  # its claims find nothing
        await holder.rollback()  # which notifies nobody
        assert (await answer).assign.spec.job_id == job_id


async def test_the_raw_answer_of_an_async_job_is_written(service: Service) -> None:
    job_id = await service.started()
    async with service.worker() as worker:
        await worker.finish(await worker.take())
    path = (await service.get(job_id)).params.struct_value["output_path"]
    key = path.removeprefix(f"s3://{service.blobs.bucket}/")
    await until(service, key, gone=False)
    answer = json.loads(await service.blobs.get(key))
    assert (answer["inference_id"], answer["image_names"]) == (job_id, ["image_0.png"])


async def test_a_raw_answer_that_a_dying_replica_owes_is_written_by_another(
    service: Service, database_url: str
) -> None:
    job_id = await service.started()
    async with service.worker() as worker:
        await worker.finish(await worker.take())
    path = (await service.get(job_id)).params.struct_value["output_path"]
    key = path.removeprefix(f"s3://{service.blobs.bucket}/")
    await until(service, key, gone=False)
    await service.blobs.delete(key)
    async with await psycopg.AsyncConnection.connect(database_url.replace("+psycopg", "")) as connection:
        await connection.execute("UPDATE job SET is_output_missing = true")
    database = Database(database_url)
    store = JobStore(database)
    outputs = Outputs(store, service.blobs)
    await outputs.sweep(age_seconds=3600)
    assert await service.blobs.find(key) == []
    await outputs.sweep(age_seconds=0)
    assert await service.blobs.find(key)
    assert await store.without_output(0) == []
    await database.dispose()


async def test_when_all_database_connections_break_a_waiting_worker_still_gets_the_next_job(
    service: Service, database_url: str
) -> None:
    async with service.worker() as worker:
        await worker.want()
        job_id = (await service.create()).id
        url = database_url.replace("+psycopg", "")
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
            await connection.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        put = (await service.get(job_id)).params.struct_value["input_body_presign_url"]
        (await service.http.put(put, content=b"{}")).raise_for_status()
        await service.start(job_id)
        try:
            assign = (await worker.read()).assign
        except AssertionError:
            # Its stream was asking the database just then: it comes again, as workers do.
            assert await worker.code() == grpc.StatusCode.UNAVAILABLE
            async with service.worker() as again:
                assign = await again.take()
        assert assign.spec.job_id == job_id


async def test_a_stream_begins_with_hello_and_belongs_to_an_endpoint(service: Service) -> None:
    call = service.queue.Work(metadata=service.tokens.worker(service.endpoint_id))
    await call.write(pb.WorkRequest(want=pb.Want(num_jobs=1)))
    assert await ended_with(call) == grpc.StatusCode.INVALID_ARGUMENT
    call = service.queue.Work(metadata=service.tokens.worker("no endpoint"))
    assert await ended_with(call) == grpc.StatusCode.PERMISSION_DENIED
    call = service.queue.Work(metadata=service.user())
    assert await ended_with(call) == grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize(
    ("hello", "sentence"),
    [
        ({"worker_id": "a\0b"}, "contains the character NUL"),
        ({"worker_id": "a", "device": "cpu\0"}, "contains the character NUL"),
        ({"worker_id": "x" * 501}, 'hello.workerId: string "xxx'),
        ({"worker_id": "a", "version": "x" * 501}, "is too long (length: 501, maximum allowed: 500)"),
        ({}, 'hello: object has missing required properties (["workerId"])'),
    ],
)
async def test_a_worker_that_cannot_be_kept_is_refused_with_the_reason(
    service: Service, hello: dict[str, str], sentence: str
) -> None:
    call = service.queue.Work(metadata=service.tokens.worker(service.endpoint_id))
    await call.write(pb.WorkRequest(hello=pb.Hello(**hello)))
    assert await ended_with(call) == grpc.StatusCode.INVALID_ARGUMENT
    assert sentence in await call.details()


async def test_what_a_worker_says_later_is_refused_as_clearly(service: Service) -> None:
    async with service.worker() as worker:
        await worker.want(warm=["a\0b"])
        assert await worker.code() == grpc.StatusCode.INVALID_ARGUMENT
    await service.started()
    async with service.worker() as worker:
        assign = await worker.take()
        timings = worker_pb2.Timings(fetch_seconds=math.nan)
        await worker.tell(assign.lease_id, done=worker_pb2.JobDone(timings=timings))
        assert await worker.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_streams_end_when_the_service_stops_so_that_workers_go_elsewhere(
    service: Service, stopping: asyncio.Event
) -> None:
    job_id = await service.started()
    pools = service.queue.WatchPools(pb.WatchPoolsRequest(), metadata=service.tokens.service("endpoints"))
    await pools.read()
    async with service.worker() as worker:
        await worker.take()
        stopping.set()
        assert await worker.code() == grpc.StatusCode.UNAVAILABLE
    assert await ended_with(pools) == grpc.StatusCode.UNAVAILABLE
    assert (await service.get(job_id)).status == "inprogress"


@pytest.fixture
async def pools(service: Service) -> AsyncIterator[Any]:
    """A watcher: waits until the pool of the service's endpoint looks so."""
    call = service.queue.WatchPools(pb.WatchPoolsRequest(), metadata=service.tokens.service("endpoints"))

    async def until(workers: list[str], num_queued: int, num_running: int) -> None:
        async with asyncio.timeout(60):
            while True:
                response = await call.read()
                found = {
                    pool.endpoint_id: (list(pool.worker_ids), pool.num_queued, pool.num_running)
                    for pool in response.pools
                }
                if found.get(service.endpoint_id, ([], 0, 0)) == (workers, num_queued, num_running):
                    return

    yield until
    call.cancel()


@pytest.mark.slow
async def test_pools_are_told_as_workers_and_jobs_come_and_go(service: Service, pools: Any) -> None:
    await pools([], 0, 0)
    await service.started()
    await pools([], 1, 0)
    async with service.worker() as worker:
        await pools(["w"], 1, 0)
        assign = await worker.take()
        await pools(["w"], 0, 1)
        await worker.finish(assign)
        await pools(["w"], 0, 0)
    await pools([], 0, 0)


async def retire(service: Service, endpoint_id: str) -> tuple[int, int]:
    request = pb.RetireEndpointRequest(endpoint_id=endpoint_id, reason="endpoint esd-x was deleted")
    answer = await service.queue.RetireEndpoint(request, metadata=service.tokens.service("endpoints"))
    return answer.num_moved, answer.num_failed


async def test_queued_jobs_of_a_retired_endpoint_move_to_another(service: Service) -> None:
    job_id = await service.started()
    other = service.world.add_endpoint()
    assert await retire(service, service.endpoint_id) == (1, 0)
    assert await retire(service, service.endpoint_id) == (0, 0)
    job = MessageToDict(await service.get(job_id))
    assert job["params"]["sagemaker_inference_endpoint_id"] == other
    async with service.worker(endpoint_id=other) as worker:
        assert (await worker.take()).spec.job_id == job_id


async def test_queued_jobs_of_a_retired_endpoint_fail_with_the_reason_when_there_is_no_other(service: Service) -> None:
    job_id = await service.started()
    service.world.endpoints.clear()
    assert await retire(service, service.endpoint_id) == (0, 1)
    job = await service.get(job_id)
    assert (job.status, job.sagemaker_raw.string_value) == ("failed", "endpoint esd-x was deleted")


async def test_a_job_that_was_running_when_its_endpoint_retired_finds_its_way_too(service: Service) -> None:
    job_id = await service.started()
    async with service.worker() as worker:
        await worker.take()
        service.world.endpoints.clear()
        assert await retire(service, service.endpoint_id) == (0, 0)
    job = await service.ended(job_id)
    assert job.sagemaker_raw.string_value == "endpoint esd-x was deleted"


async def test_where_many_jobs_of_one_user_may_go_is_asked_for_once(service: Service) -> None:
    for _ in range(3):
        await service.started()
    service.world.add_endpoint()
    before = service.world.num_searches
    assert await retire(service, service.endpoint_id) == (3, 0)
    assert service.world.num_searches - before == 1


async def test_a_refusal_by_another_service_does_not_end_the_sweep(service: Service) -> None:
    receipt = await service.create()
    await service.upload(receipt)
    assert await retire(service, service.endpoint_id) == (0, 0)
    del service.world.endpoints[:]
    other = service.world.add_endpoint()
    service.world.refusal = grpc.StatusCode.RESOURCE_EXHAUSTED
    before = service.world.num_searches
    await service.start(receipt.id)
    async with asyncio.timeout(60):
        while service.world.num_searches == before:  # noqa: ASYNC110 - the sweep asks when it likes
            await asyncio.sleep(0.05)
    service.world.refusal = None
    async with service.worker(endpoint_id=other) as worker:
        assert (await worker.take()).spec.job_id == receipt.id


class TestWithoutSweeps:
    """A service that sweeps when a test says so."""

    @pytest.fixture
    def limits(self) -> Limits:
        return Limits(renew_seconds=3600.0)

    async def test_a_sweep_is_over_when_a_service_does_not_answer(self, service: Service) -> None:
        receipts = [await service.create() for _ in range(2)]
        assert await retire(service, service.endpoint_id) == (0, 0)
        for receipt in receipts:
            await service.upload(receipt)
            await service.start(receipt.id)
        service.world.refusal = grpc.StatusCode.UNAVAILABLE
        before = service.world.num_searches
        with pytest.raises(Unavailable):
            await service.retired.sweep()
        assert service.world.num_searches == before + 1


async def test_a_job_that_is_started_after_its_endpoint_retired_finds_its_way_too(service: Service) -> None:
    receipt = await service.create()
    await service.upload(receipt)
    del service.world.endpoints[:]
    other = service.world.add_endpoint()
    assert await retire(service, service.endpoint_id) == (0, 0)
    await service.start(receipt.id)
    async with service.worker(endpoint_id=other) as worker:
        assert (await worker.take()).spec.job_id == receipt.id


async def test_only_services_may_look_at_pools_and_retire_endpoints(service: Service) -> None:
    request = pb.RetireEndpointRequest(endpoint_id=str(uuid4()))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await service.queue.RetireEndpoint(request, metadata=service.user("root", "user:all"))
    assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED


async def test_a_worker_is_told_which_models_to_keep_ready_and_when_others_are_pinned(service: Service) -> None:
    endpoints, endpoint_id = service.tokens.service("endpoints"), service.endpoint_id

    async def pin(*names: str) -> None:
        await service.queue.PinModels(pb.PinModelsRequest(endpoint_id=endpoint_id, names=names), metadata=endpoints)

    await pin("gone.ckpt", "v1-5.safetensors")
    async with service.worker() as worker:
        (model,) = (await worker.read()).preload.models
        assert (model.name, model.cache_key, model.size_bytes) == ("v1-5.safetensors", "ab" * 32, 17)
        assert model.url.startswith("http")
        await pin()
        assert (await worker.read()).WhichOneof("message") == "preload"
        await pin("v1-5.safetensors")
        assert len((await worker.read()).preload.models) == 1
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await service.queue.PinModels(pb.PinModelsRequest(endpoint_id=endpoint_id), metadata=service.user())
    assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED
