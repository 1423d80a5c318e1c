"""Webhooks as rows: every way to end a job makes one, and a call whose process died is made again."""

from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text

from services.common.database import Database
from services.inference import rows
from services.inference.rows import ASYNC, DEAD, DELIVERED, PENDING, Job, Webhook, now
from services.inference.store import JobStore
from services.inference.webhooks.store import WebhookStore


@pytest.fixture
def database_url(lend_database: Callable[[str], str]) -> str:
    return lend_database("inference")


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    found = Database(database_url)
    yield found
    await found.dispose()


async def ended(database: Database, owner: str = "ann", **fields: Any) -> UUID:
    """A job that was cancelled, with a webhook unless told otherwise."""
    given: dict[str, Any] = {"webhook": "https://example.com/", "webhook_secret": "whsec_"} | fields
    job = Job(
        id=uuid4(),
        owner=owner,
        task_type="txt2img",
        inference_type=ASYNC,
        endpoint_id=uuid4(),
        endpoint_name="esd-async-test",
        instance_type="any",
        models=[],
        **given,
    )
    await JobStore(database).add(job)
    await JobStore(database).cancel(job.id, "cancelled by a test")
    return job.id


async def found(store: WebhookStore, job_id: UUID) -> Webhook:
    webhook = await store.find(str(job_id))
    assert webhook is not None
    return webhook


async def test_a_job_that_ends_has_a_webhook_that_is_due_if_it_named_one(database: Database) -> None:
    store = WebhookStore(database)
    job_id = await ended(database)
    assert await store.find(str(await ended(database, webhook=None, webhook_secret=None))) is None
    webhook = await found(store, job_id)
    assert (webhook.state, webhook.num_attempts, webhook.owner) == (PENDING, 0, "ann")
    assert await store.seconds_to_next() == 0


async def test_an_attempt_is_one_process_own_until_its_lease_is_over(database: Database) -> None:
    store = WebhookStore(database)
    job_id = await ended(database)
    ((webhook, job),) = await store.claim(10, 60.0)
    assert (webhook.job_id, job.failure, webhook.num_attempts) == (job_id, "cancelled by a test", 1)
    assert await store.claim(10, 60.0) == []
    assert 0 < await store.seconds_to_next() <= 60


async def test_an_owner_has_a_share_of_the_calls_and_who_has_fewest_goes_first(database: Database) -> None:
    store = WebhookStore(database)
    anns = [await ended(database) for _ in range(3)]
    bobs, carls = await ended(database, "bob"), await ended(database, "carl")
    calls: list[str] = []

    async def claim(limit: int) -> list[UUID]:
        found = await store.claim(limit, 60.0, calls, share=2)
        calls.extend(webhook.owner for webhook, _ in found)
        return [webhook.job_id for webhook, _ in found]

    assert await claim(1) == anns[:1]
    assert await claim(1) == [bobs]
    assert set(await claim(9)) == {carls, anns[1]}
    assert await claim(9) == []
    assert 0 < await store.seconds_to_next(calls, share=2) <= 60  # that of those whose turn it is
    calls.remove("ann")
    assert await store.seconds_to_next(calls, share=2) == 0
    assert await claim(9) == anns[2:]


async def test_the_time_of_the_attempts_begins_with_the_first(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "now", lambda: now() - timedelta(hours=1))  # a host's clock has no part in it
    store = WebhookStore(database)
    await ended(database)
    async with database.transaction() as session:
        waited = "since_time = now() - interval '3 hours', due_time = now() - interval '3 hours'"
        await session.execute(text(f"UPDATE webhook SET {waited}"))
    ((first, _),) = await store.claim(1, 0.0)
    assert abs(first.since_time - now()) < timedelta(minutes=30)
    ((second, _),) = await store.claim(1, 60.0)
    assert second.since_time == first.since_time
    assert await store.claim(1, 60.0) == []


async def test_a_call_whose_process_died_is_made_again_and_only_the_latest_counts(database: Database) -> None:
    store = WebhookStore(database)
    job_id = await ended(database)
    ((lost, _),) = await store.claim(10, 0.0)
    ((again, _),) = await store.claim(10, 60.0)
    assert (again.num_attempts, again.message_id) == (2, lost.message_id)
    await store.end(lost, DEAD, "too late")
    assert (await found(store, job_id)).state == PENDING
    await store.end(again, DELIVERED, None)
    assert (await found(store, job_id)).state == DELIVERED
    assert await store.claim(10, 60.0) == []


async def test_a_failed_attempt_waits_and_a_dead_webhook_is_due_again_when_it_is_sent_again(database: Database) -> None:
    store = WebhookStore(database)
    job_id = await ended(database)
    ((webhook, _),) = await store.claim(10, 60.0)
    await store.retry(webhook, "503", 100.0)
    assert 90 < await store.seconds_to_next() <= 100
    assert await store.resend(job_id) is None
    await store.end(webhook, DEAD, "503")
    assert await store.seconds_to_next() == float("inf")
    again = await store.resend(job_id)
    assert again is not None
    assert (again.state, again.num_attempts, again.last_error) == (PENDING, 0, None)
    assert len(await store.claim(10, 60.0)) == 1
    await JobStore(database).delete([job_id])
    assert await store.find(str(job_id)) is None
