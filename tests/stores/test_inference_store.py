import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import IntegrityError

from services.common.database import Database
from services.common.errors import FailedPrecondition, ResourceExhausted
from services.common.leftovers import LeftoverStore
from services.inference import rows
from services.inference.queue.claim import CLAIM, MAX_PASSED_OVER, WARM_WINDOW
from services.inference.queue.pool_store import PoolState, PoolStore
from services.inference.queue.store import LeaseStore
from services.inference.rows import ASYNC, LAST_ATTEMPT, MAX_LOST, REAL_TIME, Job, Submission, Worker, now
from services.inference.store import JobFilter, JobStore
from services.inference.submitting.quotas import Quotas
from services.inference.submitting.submissions import SubmittedBefore
from services.inference.table import recent_successes, totals

FROZEN: dict[str, Any] = {
    "payload": {"steps": 1},
    "payload_sha256": "00",
    "num_images": 1,
    "cost_seconds": 1.0,
    "submit_time": now(),
    "output_id": None,
    "timings": {},
}
IMAGE = {"name": "image_0.png", "size_bytes": 8, "sha256": "00"}


@dataclass
class Pool:
    """One endpoint, its jobs and its workers."""

    store: JobStore
    leases: LeaseStore
    pools: PoolStore
    database: Database
    endpoint_id: UUID = field(default_factory=uuid4)
    streams: dict[str, UUID] = field(default_factory=dict)

    async def add(
        self,
        owner: str = "ann",
        cost: float = 1.0,
        model: str = "m",
        inference_type: str = ASYNC,
        queued: bool = True,
        **more: Any,
    ) -> UUID:
        job = Job(
            id=uuid4(),
            owner=owner,
            task_type="txt2img",
            inference_type=inference_type,
            endpoint_id=self.endpoint_id,
            endpoint_name="esd-async-test",
            instance_type="any",
            models=[],
            base_model_key=model,
            **more,
        )
        await self.store.add(job)
        if queued:
            await self.queue(job.id, cost)
        return job.id

    async def queue(self, job_id: UUID, cost: float = 1.0) -> None:
        await self.store.queue(job_id, **(FROZEN | {"cost_seconds": cost, "submit_time": now()}))

    async def welcome(self, worker_id: str = "w", held: list[UUID] | None = None) -> list[UUID]:
        self.streams[worker_id] = uuid4()
        worker = Worker(
            endpoint_id=self.endpoint_id,
            worker_id=worker_id,
            stream_id=self.streams[worker_id],
            device="cpu",
            version="0",
            last_seen=now(),
        )
        return await self.leases.welcome(worker, held or [])

    async def claim(self, worker_id: str = "w", num_jobs: int = 1, warm: list[str] | None = None) -> list[Job]:
        return await self.leases.claim(self.endpoint_id, worker_id, self.streams[worker_id], num_jobs, warm or [])

    async def claim_one(self, worker_id: str = "w", warm: list[str] | None = None) -> Job:
        (job,) = await self.claim(worker_id, 1, warm)
        return job

    async def get(self, job_id: UUID) -> Job:
        job = await self.store.get(job_id)
        assert job is not None
        return job

    async def leave(self, worker_id: str = "w") -> int:
        return await self.leases.leave(self.endpoint_id, worker_id, self.streams[worker_id])


@pytest.fixture
def database_url(lend_database: Callable[[str], str]) -> str:
    return lend_database("inference")


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[Pool]:
    database = Database(database_url)
    pool = Pool(JobStore(database), LeaseStore(database), PoolStore(database), database)
    await pool.welcome()
    yield pool
    await database.dispose()


def lease(job: Job) -> UUID:
    assert job.lease_id is not None
    return job.lease_id


async def test_a_claim_leases_the_job_to_the_worker(pool: Pool) -> None:
    job_id = await pool.add()
    claimed = await pool.claim_one()
    stored = await pool.get(job_id)
    assert (claimed.id, claimed.lease_id) == (job_id, stored.lease_id)
    assert (stored.worker_id, stored.num_claims, stored.status) == ("w", 1, "inprogress")
    assert await pool.claim() == []


async def test_a_created_job_is_not_claimed(pool: Pool) -> None:
    await pool.add(queued=False)
    assert await pool.claim() == []


async def test_jobs_of_one_user_are_claimed_in_order(pool: Pool) -> None:
    added = [await pool.add() for _ in range(5)]
    assert [job.id for job in await pool.claim(num_jobs=9)] == added


async def test_real_time_goes_before_async(pool: Pool) -> None:
    await pool.add()
    urgent = await pool.add(inference_type=REAL_TIME)
    assert (await pool.claim_one()).id == urgent


async def test_a_higher_priority_goes_first_whoever_owns_it_but_not_before_real_time(pool: Pool) -> None:
    low = await pool.add(priority=-1, model="warm")
    normal = await pool.add("bob")
    urgent = await pool.add("carl", priority=5)
    live = await pool.add(inference_type=REAL_TIME, priority=-9)
    assert [job.id for job in await pool.claim(num_jobs=3, warm=["warm"])] == [live, urgent, normal]
    assert (await pool.claim_one()).id == low


async def test_a_job_that_is_late_fails_waiting_or_running(pool: Pool) -> None:
    running = await pool.add(deadline_seconds=3600.0)
    await pool.leases.start(pool.endpoint_id, lease(await pool.claim_one()))
    waiting, in_time = await pool.add(deadline_seconds=3600.0), await pool.add(deadline_seconds=7200.0)
    assert await pool.store.expire() == pytest.approx(3600, abs=60)
    async with pool.database.transaction() as session:
        await session.execute(text("UPDATE job SET deadline_time = deadline_time - interval '3600 seconds'"))
    assert await pool.store.expire() == pytest.approx(3600, abs=60)
    for late in (running, waiting):
        assert (await pool.get(late)).failure == "the deadline passed: the job had not ended 3600 s after its start"
    assert await pool.leases.leases(pool.endpoint_id, "w") == set()
    assert (await pool.get(in_time)).status == "inprogress"
    await pool.queue(running)
    assert await pool.store.expire() == pytest.approx(3600, abs=60)


async def test_a_user_has_a_number_of_jobs_in_the_queue_and_no_more(pool: Pool) -> None:
    store = JobStore(pool.database, Quotas(max_queued_jobs=2))
    ids = [await pool.add(queued=False) for _ in range(6)]

    async def queue(job_id: UUID) -> bool:
        try:
            await store.queue(job_id, **FROZEN)
        except ResourceExhausted:
            return False
        return True

    assert sorted(await asyncio.gather(*(queue(job_id) for job_id in ids[:5]))) == [False] * 3 + [True] * 2
    with pytest.raises(ResourceExhausted, match="2 jobs of ann wait already; at most 2 are possible") as caught:
        await store.queue(ids[5], **FROZEN)
    assert caught.value.retry_after_seconds == 10
    await pool.claim_one()
    assert await queue(ids[5])
    refused = [job for job_id in ids if (job := await pool.get(job_id)).status == "created"]
    assert len(refused) == 3
    assert await pool.add("bob")


async def test_a_user_has_so_many_gpu_seconds_an_hour(pool: Pool) -> None:
    store = JobStore(pool.database, Quotas(max_gpu_seconds_per_hour=100.0))
    for _ in range(2):
        await pool.add()
        await pool.leases.succeed(pool.endpoint_id, lease(await pool.claim_one()), [IMAGE], {"pipeline_seconds": 60.0})
    job_id = await pool.add(queued=False)
    with pytest.raises(ResourceExhausted, match="ann has used 120 GPU-seconds within the last hour; 100 are") as caught:
        await store.queue(job_id, **FROZEN)
    assert caught.value.retry_after_seconds == pytest.approx(3600, abs=60)
    await store.delete([job_id])  # deleting jobs gives nothing back
    job_id = await pool.add(queued=False)
    with pytest.raises(ResourceExhausted):
        await store.queue(job_id, **FROZEN)
    await store.forget()
    async with pool.database.transaction() as session:
        await session.execute(text("UPDATE usage SET minute = minute - interval '61 minutes'"))
    await store.queue(job_id, **FROZEN)


async def test_what_a_users_jobs_under_way_will_take_counts_before_they_end(pool: Pool) -> None:
    store = JobStore(pool.database, Quotas(max_gpu_seconds_per_hour=100.0))
    await pool.add(cost=2.0)  # takes 20 s, so this endpoint needs ten seconds for a unit of cost
    await pool.leases.succeed(pool.endpoint_id, lease(await pool.claim_one()), [IMAGE], {"pipeline_seconds": 20.0})
    await pool.add(cost=3.0)
    await pool.claim_one()
    await pool.add(cost=4.0)
    await pool.add("bob", cost=50.0)
    ids = [await pool.add(queued=False) for _ in range(2)]
    await store.queue(ids[0], **FROZEN | {"cost_seconds": 1.0})
    told = "ann has used 20 GPU-seconds within the last hour, and the jobs under way will take about 80; 100 are"
    with pytest.raises(ResourceExhausted, match=told) as caught:
        await store.queue(ids[1], **FROZEN)
    assert caught.value.retry_after_seconds == 10


async def test_a_key_is_remembered_for_a_day(pool: Pool) -> None:
    def job(key: str = "k") -> tuple[Job, Submission]:
        made = Job(id=uuid4(), owner="ann", task_type="txt2img", inference_type=ASYNC, endpoint_id=pool.endpoint_id,
                   endpoint_name="e", instance_type="any", models=[])  # fmt: skip
        return made, Submission(owner="ann", key=key, body_sha256="00", job_id=made.id)

    outcomes = await asyncio.gather(*(pool.store.add(*job()) for _ in range(4)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes if outcome] == [SubmittedBefore] * 3
    found = await pool.store.find_submission("ann", "k")
    assert found is not None
    assert found[1].owner == "ann"
    assert await pool.store.find_submission("bob", "k") is None
    assert len(await pool.store.page(JobFilter("txt2img"), 9, None)) == 1
    async with pool.database.transaction() as session:
        await session.execute(text("UPDATE submission SET create_time = create_time - interval '25 hours'"))
    assert await pool.store.find_submission("ann", "k") is None
    await pool.store.add(*job())
    await pool.store.forget()
    assert await pool.store.find_submission("ann", "k") is not None


async def test_jobs_are_removed_when_they_are_old_unless_they_are_under_way(pool: Pool) -> None:
    queued, created, ended = await pool.add(), await pool.add(queued=False), await pool.add(queued=False)
    await pool.store.cancel(ended, "not wanted")
    assert await pool.store.delete_old(days=2) == 0
    async with pool.database.transaction() as session:
        older = "create_time - interval '3 days', complete_time = complete_time - interval '1 day'"
        await session.execute(text(f"UPDATE job SET create_time = {older}"))
    assert await pool.store.delete_old(days=2) == 1
    assert await pool.store.get(created) is None
    assert await pool.store.delete_old(days=0.5) == 1
    assert await pool.store.get(ended) is None
    assert (await pool.get(queued)).status == "inprogress"
    prefixes = {leftover.prefix for leftover in await LeftoverStore(pool.database).due(99)}
    assert {f"out/{ended}/", f"out/{created}/", f"txt2img/infer_v2/{created}/"} <= prefixes


async def test_a_user_with_one_job_does_not_wait_for_all_of_a_user_with_many(pool: Pool) -> None:
    for _ in range(10):
        await pool.add("ann")
    await pool.add("bob")
    owners = [(await pool.claim_one()).owner for _ in range(4)]
    assert "bob" in owners[:2]


async def test_users_share_the_gpu_time_whatever_their_jobs_cost(pool: Pool) -> None:
    for _ in range(40):
        await pool.add("ann", cost=1.0)
    for _ in range(40):
        await pool.add("bob", cost=4.0)
    claimed = [await pool.claim_one() for _ in range(25)]
    seconds = {owner: sum(job.cost_seconds for job in claimed if job.owner == owner) for owner in ("ann", "bob")}
    assert abs(seconds["ann"] - seconds["bob"]) <= 4.0


async def test_a_user_who_was_away_gets_no_credit_for_it(pool: Pool) -> None:
    for _ in range(20):
        await pool.add("ann")
    for _ in range(10):
        await pool.claim_one()
    for _ in range(10):
        await pool.add("bob")
    owners = [(await pool.claim_one()).owner for _ in range(10)]
    assert 4 <= owners.count("bob") <= 6


async def test_a_warm_job_is_preferred_but_a_cold_one_is_not_passed_over_for_ever(pool: Pool) -> None:
    cold = await pool.add(model="cold")
    for _ in range(MAX_PASSED_OVER + 5):
        await pool.add(model="warm")
    order = [(await pool.claim_one(warm=["warm"])).id for _ in range(MAX_PASSED_OVER + 1)]
    assert order.index(cold) == MAX_PASSED_OVER


async def test_two_claimers_at_once_get_different_jobs_and_miss_none(pool: Pool) -> None:
    added = {await pool.add(owner=f"user{number % 5}") for number in range(40)}
    names = [f"w{number}" for number in range(6)]
    for name in names:
        await pool.welcome(name)

    async def claim_all(name: str) -> list[UUID]:
        got: list[UUID] = []
        while jobs := await pool.claim(name, num_jobs=2):
            got += [job.id for job in jobs]
        return got

    claimed = [job for jobs in await asyncio.gather(*(claim_all(name) for name in names)) for job in jobs]
    assert len(claimed) == len(added)
    assert set(claimed) == added


async def test_a_stream_that_was_superseded_claims_nothing(pool: Pool) -> None:
    await pool.add()
    old = pool.streams["w"]
    await pool.welcome()
    assert await pool.leases.claim(pool.endpoint_id, "w", old, 1, []) == []
    assert await pool.leases.renew(pool.endpoint_id, "w", old) is False
    assert await pool.leases.renew(pool.endpoint_id, "w", pool.streams["w"]) is True
    assert len(await pool.claim()) == 1


async def test_a_result_counts_only_under_the_current_lease(pool: Pool) -> None:
    job_id = await pool.add()
    old = lease(await pool.claim_one())
    await pool.leave()
    await pool.welcome("v")
    new = lease(await pool.claim_one("v"))
    assert await pool.leases.succeed(pool.endpoint_id, old, [IMAGE], {}) is None
    assert await pool.leases.fail(pool.endpoint_id, old, "late") is None
    assert await pool.leases.start(pool.endpoint_id, old) is False
    assert await pool.leases.succeed(uuid4(), new, [IMAGE], {}) is None
    ended = await pool.leases.succeed(pool.endpoint_id, new, [IMAGE], {"pipeline_seconds": 1.0})
    assert ended is not None
    assert await pool.leases.succeed(pool.endpoint_id, new, [IMAGE], {}) is None
    stored = await pool.get(job_id)
    assert (stored.status, stored.result_lease, stored.image_names) == ("succeed", new, ["image_0.png"])
    assert stored.result_objects == [IMAGE]
    assert stored.result_prefix == f"out/{job_id}/result/{new}/"


async def test_a_worker_that_comes_back_keeps_what_it_shows_and_loses_what_it_does_not(pool: Pool) -> None:
    for _ in range(2):
        await pool.add()
    shown, forgotten = await pool.claim(num_jobs=2)
    foreign = uuid4()
    assert await pool.welcome(held=[lease(shown), foreign]) == [lease(shown)]
    assert (await pool.get(forgotten.id)).lease_id is None
    assert (await pool.get(shown.id)).lease_id == shown.lease_id


async def test_leaving_by_an_old_stream_takes_nothing_from_the_new_one(pool: Pool) -> None:
    await pool.add()
    job = await pool.claim_one()
    old = pool.streams["w"]
    await pool.welcome(held=[lease(job)])
    assert await pool.leases.leave(pool.endpoint_id, "w", old) == 0
    assert (await pool.get(job.id)).lease_id == job.lease_id


async def test_what_a_worker_held_that_is_lost_goes_to_others_unless_it_is_renewed_meanwhile(pool: Pool) -> None:
    job_id = await pool.add()
    await pool.claim_one()
    before = await pool.leases.seen()
    assert await pool.leases.renew(pool.endpoint_id, "w", pool.streams["w"])
    assert await pool.leases.reap(before) == 0
    assert await pool.leases.reap(await pool.leases.seen()) == 1
    assert (await pool.get(job_id)).status == "inprogress"
    await pool.welcome("v")
    assert (await pool.claim_one("v")).id == job_id


@pytest.mark.parametrize("starts", [True, False])
async def test_a_job_fails_when_its_worker_was_lost_three_times_however_far_it_came(pool: Pool, starts: bool) -> None:
    job_id = await pool.add()
    for attempt in range(MAX_LOST):
        assert (await pool.get(job_id)).status == "inprogress"
        job = await pool.claim_one()
        if attempt == LAST_ATTEMPT:
            await pool.leave()  # it still waited for what else its worker had
            await pool.welcome()
            job = await pool.claim_one()
            await pool.leases.entrust(pool.endpoint_id, lease(job))
        if starts:
            await pool.leases.start(pool.endpoint_id, lease(job))
        await pool.leave()
        await pool.welcome()
    stored = await pool.get(job_id)
    assert stored.failure == "the worker was lost while it had this job, 3 times"
    assert await pool.claim() == []


async def test_a_job_that_a_worker_has_no_room_for_goes_to_each_other_one_and_then_fails_with_the_reason(
    pool: Pool,
) -> None:
    job_id = await pool.add()
    await pool.welcome("v")
    await pool.leases.decline(pool.endpoint_id, lease(await pool.claim_one()), "x.ckpt does not fit")
    assert await pool.claim() == []
    assert not await pool.leases.has_queued(pool.endpoint_id, "w")
    await pool.leave("v")
    again = await pool.claim_one()  # there is no other one any more
    await pool.welcome("v")
    await pool.leases.decline(pool.endpoint_id, lease(again), "x.ckpt does not fit")
    await pool.leases.decline(pool.endpoint_id, lease(await pool.claim_one("v")), "nor here")
    stored = await pool.get(job_id)
    assert (stored.status, stored.failure, stored.num_lost) == ("failed", "nor here", 0)
    await pool.queue(job_id)
    assert (await pool.claim_one()).id == job_id


async def test_a_job_under_way_cannot_be_started_and_a_finished_one_starts_afresh(pool: Pool) -> None:
    job_id = await pool.add()
    with pytest.raises(FailedPrecondition, match="under way"):
        await pool.queue(job_id)
    await pool.leases.succeed(pool.endpoint_id, lease(await pool.claim_one()), [IMAGE], {})
    await pool.queue(job_id)
    again = await pool.get(job_id)
    assert (again.status, again.image_names, again.result_lease, again.start_time) == ("inprogress", None, None, None)
    await pool.leases.fail(pool.endpoint_id, lease(await pool.claim_one()), "broken")
    assert (await pool.get(job_id)).failure == "broken"
    await pool.queue(job_id)
    assert (await pool.get(job_id)).failure is None


async def test_cancelling_ends_what_has_not_ended_and_its_lease(pool: Pool) -> None:
    held_id, queued_id, created_id = await pool.add(), await pool.add(), await pool.add(queued=False)
    held = await pool.claim_one()
    for job_id in (held_id, queued_id, created_id, queued_id):
        job = await pool.store.cancel(job_id, "not wanted")
        assert job is not None
        assert (job.status, job.is_cancelled, job.failure) == ("failed", True, "not wanted")
    assert await pool.store.cancel(uuid4(), "not wanted") is None
    assert await pool.leases.leases(pool.endpoint_id, "w") == set()
    assert await pool.leases.succeed(pool.endpoint_id, lease(held), [IMAGE], {}) is None
    await pool.queue(held_id)
    await pool.leases.fail(pool.endpoint_id, lease(await pool.claim_one()), "broken")
    with pytest.raises(FailedPrecondition, match="has ended already: its status is failed"):
        await pool.store.cancel(held_id, "too late")
    assert (await pool.get(held_id)).failure == "broken"


async def test_deleting_removes_jobs_in_any_state_and_ends_their_leases(pool: Pool) -> None:
    held_id, queued_id = await pool.add(), await pool.add()
    held = await pool.claim_one()
    assert {job.id for job in await pool.store.delete([held_id, queued_id, uuid4()])} == {held_id, queued_id}
    assert await pool.store.get(held_id) is None
    assert await pool.leases.leases(pool.endpoint_id, "w") == set()
    assert await pool.leases.succeed(pool.endpoint_id, lease(held), [IMAGE], {}) is None


async def test_a_job_that_its_worker_gives_back_is_queued_again(pool: Pool) -> None:
    job_id = await pool.add()
    job = await pool.claim_one()
    assert await pool.leases.give_back(pool.endpoint_id, lease(job)) is True
    assert await pool.leases.give_back(pool.endpoint_id, lease(job)) is False
    assert (await pool.claim_one()).id == job_id


async def test_a_job_that_has_begun_has_the_outage_behind_it(pool: Pool) -> None:
    job_id = await pool.add()
    await pool.leases.postpone(pool.endpoint_id, lease(await pool.claim_one()), "the store is away", 60.0)
    assert (await pool.get(job_id)).postponed_since is not None
    await pool.leases.start(pool.endpoint_id, lease(await pool.claim_one()))
    assert (await pool.get(job_id)).postponed_since is None


async def test_whatever_was_uploaded_under_a_lease_that_is_lost_is_removed_now_and_at_its_end(pool: Pool) -> None:
    job_id, leftovers = await pool.add(), LeftoverStore(pool.database)
    lost = lease(await pool.claim_one())
    await pool.leave()
    (found,) = await leftovers.due(9)
    assert found.prefix == f"out/{job_id}/result/{lost}/"
    await leftovers.swept(found.prefix, found.due_time)
    assert await leftovers.due(9) == []
    async with pool.database.transaction() as session:
        day = "interval '24 hours'"
        await session.execute(text(f"UPDATE leftover SET due_time = due_time - {day}, final_time = final_time - {day}"))
    (found,) = await leftovers.due(9)
    await leftovers.swept(found.prefix, found.due_time)
    async with pool.database.transaction() as session:
        assert await session.scalar(text("SELECT count(*) FROM leftover")) == 0


async def test_a_failure_without_uploads_leaves_nothing_to_remove(pool: Pool) -> None:
    leftovers = LeftoverStore(pool.database)
    for leaves_objects in (False, True):
        assert await leftovers.due(9) == []
        await pool.add()
        held = lease(await pool.claim_one())
        await pool.leases.fail(pool.endpoint_id, held, "broken", leaves_objects=leaves_objects)
    assert [found.prefix.split("/")[-2] for found in await leftovers.due(9)] == [str(held)]


async def test_pools_count_workers_and_jobs(pool: Pool) -> None:
    for _ in range(3):
        await pool.add()
    await pool.welcome("v")
    await pool.claim_one()
    assert await pool.pools.pools() == {pool.endpoint_id: PoolState(["v", "w"], 2, 1, None)}


async def test_pools_tell_seconds_of_work_by_the_pace_of_the_last_successes(pool: Pool) -> None:
    await pool.add(cost=2.0)
    done = await pool.claim_one()
    await pool.leases.start(pool.endpoint_id, lease(done))
    await pool.leases.succeed(pool.endpoint_id, lease(done), [IMAGE], {})
    async with pool.database.transaction() as session:
        await session.execute(text("UPDATE job SET start_time = complete_time - interval '6 seconds'"))
    assert await pool.pools.pools() == {pool.endpoint_id: PoolState(["w"])}
    for cost in (1.0, 4.0, 5.0):
        await pool.add(cost=cost)
    assert (await pool.pools.pools())[pool.endpoint_id].work_seconds == pytest.approx(30)
    held = await pool.claim(num_jobs=2)
    assert [job.cost_seconds for job in held] == [1.0, 4.0]
    assert (await pool.pools.pools())[pool.endpoint_id].work_seconds == pytest.approx(3 * (2.5 + 5) / 2)
    await pool.leave()
    assert (await pool.pools.pools())[pool.endpoint_id] == PoolState([], 3)


async def test_a_host_whose_clock_is_wrong_changes_no_deadline_and_no_pace(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "now", lambda: now() - timedelta(hours=1))
    job_id = await pool.add(queued=False, deadline_seconds=600.0)
    await pool.store.queue(job_id, **(FROZEN | {"submit_time": rows.now()}))
    assert await pool.store.expire() == pytest.approx(600, abs=60)
    job = await pool.claim_one()
    await pool.leases.start(pool.endpoint_id, lease(job))
    ended = await pool.leases.succeed(pool.endpoint_id, lease(job), [IMAGE], {})
    stored = await pool.get(job_id)
    assert ended is not None
    assert stored.start_time is not None
    assert stored.complete_time is not None
    assert stored.complete_time == ended.complete_time
    assert stored.complete_time > stored.start_time
    await pool.add()
    assert ((await pool.pools.pools())[pool.endpoint_id].work_seconds or 0) > 0


async def test_jobs_of_a_retired_endpoint_are_found_and_moved_once(pool: Pool) -> None:
    job_id = await pool.add()
    assert await pool.pools.stranded() == []
    await pool.pools.retire(pool.endpoint_id, "endpoint deleted")
    ((job, reason),) = await pool.pools.stranded(pool.endpoint_id)
    assert (job.id, reason) == (job_id, "endpoint deleted")
    other = uuid4()
    assert await pool.pools.move(job, (other, "esd-async-other", "any")) is True
    # Another replica found it stranded too.
    assert await pool.pools.move(job, (uuid4(), "esd-async-third", "any")) is False
    assert await pool.pools.fail_stranded(job, "no endpoint") is False
    assert (await pool.get(job_id)).endpoint_id == other
    assert await pool.pools.stranded() == []


async def test_a_job_of_a_retired_endpoint_is_failed_once(pool: Pool) -> None:
    job_id = await pool.add()
    await pool.pools.retire(pool.endpoint_id, "endpoint deleted")
    ((job, _),) = await pool.pools.stranded()
    assert await pool.pools.fail_stranded(job, "no endpoint") is True
    assert await pool.pools.fail_stranded(job, "no endpoint") is False
    assert (await pool.get(job_id)).failure == "no endpoint"


async def test_pages_go_from_newest_to_oldest_and_keep_owners_apart(pool: Pool) -> None:
    added = [await pool.add(owner, queued=False) for owner in ("ann", "bob", "ann", "ann")]
    anns, everybodys = JobFilter("txt2img", ["ann"]), JobFilter("txt2img")
    first = await pool.store.page(anns, 2, None)
    second = await pool.store.page(anns, 2, (first[-1].create_time, first[-1].id))
    assert [job.id for job in first + second] == [added[3], added[2], added[0]]
    assert [job.id for job in await pool.store.page(everybodys, 9, None)] == added[::-1]
    assert await pool.store.page(JobFilter("img2img"), 9, None) == []


@pytest.mark.parametrize(
    "change",
    [
        "status = 'running'",
        "status = 'succeed'",
        "status = 'failed'",
        "lease_id = gen_random_uuid()",
        "is_running = true",
        "virtual_start = NULL",
        "failure = 'but it goes on'",
    ],
)
async def test_no_statement_leaves_a_job_between_states(pool: Pool, change: str) -> None:
    await pool.add()
    with pytest.raises(IntegrityError):
        async with pool.database.transaction() as session:
            await session.execute(text(f"UPDATE job SET {change}"))


async def fill(pool: Pool, num_finished: int, num_queued: int, num_users: int) -> None:
    """Rows as a busy year leaves them, made in the database."""
    columns = """id, owner, task_type, inference_type, endpoint_id, endpoint_name, instance_type, models, create_time,
        num_images, priority_class, cost_seconds, base_model_key, passed_over, is_running, num_lost, status, num_claims,
        result_lease, image_names, complete_time, submit_time, payload, virtual_start"""
    values = f"""gen_random_uuid(), 'user' || n % {num_users}, 'txt2img', 'Async', '{pool.endpoint_id}', 'e', 'any',
        '[]', now() - n * interval '30 s', 1, 1, 1, 'm', 0, false, 0"""
    finished = "'succeed', 1, gen_random_uuid(), '[]'::jsonb, now(), now(), NULL, n"
    queued = f"'inprogress', 0, NULL, NULL, NULL, now(), '{{}}'::jsonb, n / {num_users}"
    async with pool.database.transaction() as session:
        for number, ends in ((num_finished, finished), (num_queued, queued)):
            series = f"generate_series(1, {number}) n"
            await session.execute(text(f"INSERT INTO job ({columns}) SELECT {values}, {ends} FROM {series}"))
    async with pool.database.transaction() as session:
        await session.execute(text("ANALYZE job"))


async def explained(pool: Pool, query: Any) -> str:
    """How the database runs the query, as text."""
    sql = str(query.compile(dialect=postgresql.dialect(), compile_kwargs={"literal_binds": True}))
    async with pool.database.transaction() as session:
        return "\n".join(await session.scalars(text("EXPLAIN ANALYZE " + sql)))


def claim_in(pool: Pool) -> Any:
    """The claim of a job."""
    return CLAIM.params(endpoint=pool.endpoint_id, worker="w", stream=pool.streams["w"], num_jobs=1, warm_models=["m"])


async def test_the_claim_decides_once_who_is_next_however_old_the_statistics_are(pool: Pool) -> None:
    await fill(pool, num_finished=1_000, num_queued=0, num_users=10)
    for _ in range(50):
        await pool.add()
    decided = [line for line in (await explained(pool, claim_in(pool))).splitlines() if "WindowAgg" in line]
    assert decided
    assert [line for line in decided if "loops=1)" not in line] == []


@pytest.mark.parametrize(
    ("num_finished", "num_queued", "num_users"),
    [
        (5_000, 1_000, 100),
        pytest.param(1_000_000, 10_000, 1_000, marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
    ],
)
async def test_the_claim_reads_a_few_rows_of_the_queue_by_its_partial_index(
    pool: Pool, num_finished: int, num_queued: int, num_users: int
) -> None:
    await fill(pool, num_finished, num_queued, num_users)
    plan = await explained(pool, claim_in(pool))
    assert "using job_queue on job" in plan
    assert "Seq Scan on job" not in plan
    assert "Sort Key: job.priority_class" not in plan  # the index has the order
    scanned = next(line for line in plan.splitlines() if "using job_queue on job" in line)
    assert int(float(scanned.split("rows=")[2].split()[0])) <= WARM_WINDOW


async def test_the_pace_of_an_endpoint_is_read_by_the_index_of_its_last_successes(pool: Pool) -> None:
    await fill(pool, num_finished=5_000, num_queued=10, num_users=10)
    plan = await explained(pool, totals(recent_successes(pool.endpoint_id)))
    assert "using job_last_successes on job" in plan
    assert "Sort" not in plan
