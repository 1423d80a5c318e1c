import asyncio
import json
from typing import Any

import grpc
import psycopg
import pytest

from esd.inference.v1 import inference_pb2 as pb
from services.common.database import Database
from services.common.errors import Unavailable
from services.common.leftovers import LeftoverStore
from services.inference.store import JobStore
from services.inference.upkeep.cleaning import Cleaner
from tests.services.inference.conftest import LARGE, Service

pytestmark = pytest.mark.timeout(60)


async def test_jobs_are_removed_with_their_objects_when_their_retention_is_over(
    service: Service, database_url: str
) -> None:
    old_id, new_id = await service.started(), await service.started()
    async with service.worker() as worker:
        for _ in range(2):
            await worker.finish(await worker.take())
    async with await psycopg.AsyncConnection.connect(database_url.replace("+psycopg", "")) as time_machine:
        past = "UPDATE job SET complete_time = complete_time - interval '8 days' WHERE id = %s"
        await time_machine.execute(past, [old_id])
    database = Database(database_url)
    cleaner = Cleaner(LeftoverStore(database), JobStore(database), service.blobs, 0.05, retention_days=7)
    running = asyncio.create_task(cleaner.run())
    async with asyncio.timeout(60):
        while await service.blobs.find(f"out/{old_id}/"):  # noqa: ASYNC110 - nothing tells of what is done to objects
            await asyncio.sleep(0.05)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await database.dispose()
    listed = await service.jobs.ListInferenceJobs(pb.ListInferenceJobsRequest(), metadata=service.user())
    assert [job.id for job in listed.inferences] == [new_id]
    assert await service.blobs.find(f"out/{new_id}/")
    assert await service.blobs.find(f"txt2img/infer_v2/{old_id}/") == []


async def test_a_payload_whose_job_did_not_come_goes_and_one_whose_job_came_stays(
    service: Service, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = json.dumps(LARGE)
    kept = await service.create(payload_string=payload)
    before = await keys(service)
    with monkeypatch.context() as broken:
        broken.setattr(JobStore, "add", unavailable)
        with pytest.raises(grpc.aio.AioRpcError):
            await service.create(payload_string=payload)
    assert len(await keys(service)) == len(before) + 2
    async with await psycopg.AsyncConnection.connect(database_url.replace("+psycopg", "")) as time_machine:
        await time_machine.execute("UPDATE leftover SET due_time = due_time - interval '2 hours'")
    database = Database(database_url)
    await Cleaner(LeftoverStore(database), JobStore(database), service.blobs, 1.0).sweep()
    await database.dispose()
    assert await keys(service) == before
    assert len([key for key in before if kept.inference_id in key]) == 2


async def keys(service: Service) -> set[str]:
    return {blob.key for blob in await service.blobs.find("")}


async def unavailable(*_: Any) -> None:
    raise Unavailable("the database does not answer")
