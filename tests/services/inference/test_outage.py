"""The object store or the database goes away and comes back, as the service's users and workers see it."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit

import grpc
import pytest

from esd.inference.v1 import inference_pb2 as pb
from services.common.blobs import STORE_IS_AWAY, Blobs
from services.inference.rows import MAX_LOST
from services.inference.submitting import freezing
from tests.conftest import S3Access
from tests.line import Line
from tests.services.inference.conftest import LARGE, Service
from tests.serving import fails

pytestmark = pytest.mark.timeout(60)
REASON = "x.safetensors cannot be downloaded: the object store answers 503"


@pytest.fixture
async def blobs(s3: S3Access, line: Line) -> Blobs:
    """The store behind it."""
    return Blobs(s3.settings(endpoint_url=f"http://{line.address}"))


async def postpone(worker: Any, assign: Any) -> None:
    """Says that the job's worker does not reach the store, and hears that this is recorded."""
    await worker.tell(assign.lease_id, failed={"reason": REASON, "postponed": True})
    assert (await worker.read()).acknowledge.lease_id == assign.lease_id


async def test_a_job_that_is_given_back_for_want_of_the_store_loses_no_attempt_and_succeeds_once(
    service: Service,
) -> None:
    job_id = await service.started()
    async with service.worker() as worker:
        for _ in range(MAX_LOST + 1):
            assign = await worker.take()
            await worker.begin(assign)
            await postpone(worker, assign)
            assert (await service.get(job_id)).status == "inprogress"
        assign = await worker.take()
        assert (await worker.finish(assign)).WhichOneof("message") == "acknowledge"
    job = await service.get(job_id)
    assert (job.status, assign.lease_id in job.img_presigned_urls[0]) == ("succeed", True)


async def test_a_job_that_waits_for_the_store_past_its_deadline_says_so(service: Service) -> None:
    receipt = await service.create(deadline_seconds=1.0)
    await service.upload(receipt)
    await service.start(receipt.id)
    async with service.worker() as worker:
        await postpone(worker, await worker.take())
        job = await service.ended(receipt.id)
    assert job.sagemaker_raw.string_value == (
        "the deadline passed: the job had not ended 1 s after its start, as the object store could not be reached"
    )


@pytest.mark.parametrize("payload", [{"prompt": "a cat"}, LARGE], ids=["small", "large"])
async def test_a_start_while_the_store_is_away_is_503_and_may_be_repeated(
    service: Service, line: Line, payload: dict[str, Any]
) -> None:
    finished = await service.started()
    async with service.worker() as worker:
        await worker.finish(await worker.take())
        receipt = await service.create()
        await service.upload(receipt, **payload)
        line.shut()
        assert await fails(service.start(receipt.id), grpc.StatusCode.UNAVAILABLE) == STORE_IS_AWAY
        assert (await service.get(receipt.id)).status == "created"
        assert (await service.get(finished)).img_presigned_urls  # which are arithmetic
        line.open()
        await service.start(receipt.id)
        assign = await worker.take()
        assert assign.spec.job_id == receipt.id
        await worker.finish(assign)
    assert (await service.get(receipt.id)).status == "succeed"


async def test_a_store_that_takes_connections_and_says_nothing_is_503_in_bounded_time(
    service: Service, line: Line, s3: S3Access, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freezing, "_STORE_SECONDS", 0.5)
    receipt = await service.create()
    await service.upload(receipt)
    line.cut()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        line.url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert await fails(service.start(receipt.id), grpc.StatusCode.UNAVAILABLE) == STORE_IS_AWAY
        line.url = s3.endpoint_url
        line.cut()
    await service.start(receipt.id)
    assert (await service.get(receipt.id)).status == "inprogress"


class TestTheDatabase:
    """A service that reaches its database by a line."""

    @pytest.fixture
    async def database_line(self, lend_database: Callable[[str], str]) -> AsyncIterator[Line]:
        async with Line() as found:
            found.url = lend_database("inference")
            yield found

    @pytest.fixture
    def database_url(self, database_line: Line) -> str:
        parts = urlsplit(database_line.url)
        return parts._replace(netloc=f"{parts.username}:{parts.password}@{database_line.address}").geturl()

    async def test_who_waits_for_a_real_time_job_is_answered_though_the_database_was_away(
        self, service: Service, database_line: Line
    ) -> None:
        endpoint = service.world.add_endpoint("Real-time")
        request = pb.CreateInferenceJobRequest(
            task_type="txt2img",
            inference_type="Real-time",
            models={"Stable-diffusion": ["v1-5.safetensors"]},
            payload_string='{"prompt": "x"}',
        )
        call = service.jobs.CreateInferenceJob(request, metadata=service.user())
        async with service.worker(endpoint_id=endpoint) as worker:
            assign = await worker.take()
            database_line.shut()
            with service.notifications.subscribed(("job_ended", assign.spec.job_id)) as back:
                waited = asyncio.ensure_future(call)
                # Whoever waits looks again, and finds no database.
                await service.notifications.on_notify("job_ended", assign.spec.job_id)
                assert await worker.code() == grpc.StatusCode.UNAVAILABLE
                assert not waited.done()
                back.clear()
                database_line.open()
                await back.wait()
        async with service.worker(held=[assign.lease_id], endpoint_id=endpoint) as again:
            assert again.kept == [assign.lease_id]
            await again.finish(assign)
        assert (await waited).data.status == "succeed"
