"""Pools of real processes that follow a load: out, in, to zero and back, and what is told of it."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from services.common.viewer import Viewer
from services.endpoints.domain import Change, Endpoints, NewEndpoint
from services.endpoints.event_store import EventStore
from services.endpoints.rows import Endpoint
from services.endpoints.scaling import ScalingPolicy
from services.endpoints.store import EndpointStore
from tests.services.endpoints.conftest import Peers, RunLoop, until

ANN = Viewer("ann", [])
NEVER = 1e6
OUT_NOW = ScalingPolicy(out_seconds=0, in_seconds=NEVER)
BOTH_NOW = ScalingPolicy(out_seconds=0, in_seconds=0)

Create = Callable[..., Awaitable[Endpoint]]
Settled = Callable[..., Awaitable[Endpoint]]


@pytest.fixture
def create(domain: Endpoints) -> Create:
    """Creates an endpoint that follows its load."""

    async def make(num_initial: int = 1, num_min: int = 0, num_max: int = 3, kind: str = "Async") -> Endpoint:
        new = NewEndpoint("test", kind, "any", num_initial, True, num_min, num_max, ["painter"])
        return await domain.create_endpoint(new, "ann")

    return make


@pytest.fixture
def settled(store: EndpointStore, peers: Peers) -> Settled:
    """Waits until the endpoint is in service with so many workers, of which nothing else is left."""

    async def wait(num_workers: int) -> Endpoint:
        async def found() -> Endpoint | None:
            (row,) = await store.get_all()
            workers = await store.get_workers()
            seen = len(peers.queue.workers.get(row.id, ()))
            as_wanted = {len(workers), seen, row.num_live, row.num_workers} == {num_workers}
            return row if as_wanted and row.status == "InService" else None

        return await until(found)

    return wait


async def told(database: Any, endpoint: Endpoint) -> list[str]:
    """What the endpoint's events say of scaling, oldest first."""
    events = await EventStore(database).page_events(endpoint.id, 100, None)
    return [f"{event.type} {event.message}" for event in reversed(events) if event.type.startswith("Scaled")]


async def test_a_pool_grows_under_a_backlog_shrinks_to_nothing_when_idle_and_comes_back(
    run_loop: RunLoop, create: Create, settled: Settled, peers: Peers, database: Any
) -> None:
    loop = run_loop(policy=OUT_NOW)
    created = await create()
    first = await settled(1)
    await peers.queue.set_jobs(created.id, num_queued=8)
    grown = await settled(3)
    assert grown.end_time > first.end_time
    await loop.stop()

    run_loop(policy=BOTH_NOW)  # what was decided is in the database, whoever decides now
    await peers.queue.set_jobs(created.id)
    await settled(0)
    await peers.queue.set_jobs(created.id, num_queued=1)
    await settled(1)
    scaled = await told(database, created)
    assert scaled[0] == ("ScaledOut from 1 to 3 workers: 8 jobs wait and 0 run, which needs 3 workers of 0 to 3")
    assert scaled[-2].startswith("ScaledIn")
    assert "to 0 workers: 0 jobs wait and 0 run" in scaled[-2]
    assert scaled[-1].startswith("ScaledOut from 0 to 1 workers: 1 jobs wait")


async def test_seconds_of_work_count_where_they_are_known(
    run_loop: RunLoop, create: Create, settled: Settled, peers: Peers, database: Any
) -> None:
    run_loop(policy=OUT_NOW)
    created = await create()
    await settled(1)
    await peers.queue.set_jobs(created.id, num_queued=2, work_seconds=100.0)
    await settled(2)
    assert "about 100 s of work" in (await told(database, created))[0]


async def test_need_is_waited_out_and_a_running_job_keeps_the_last_worker(
    run_loop: RunLoop, create: Create, settled: Settled, peers: Peers, store: EndpointStore
) -> None:
    run_loop(policy=ScalingPolicy(out_seconds=NEVER, in_seconds=0))
    created = await create()
    await settled(1)
    await peers.queue.set_jobs(created.id, num_queued=9)

    async def noticed() -> bool:
        return (await store.get_all())[0].need_since is not None

    await until(noticed)
    await settled(1)
    await peers.queue.set_jobs(created.id, num_running=1)

    async def satisfied() -> bool:
        return (await store.get_all())[0].need_since is None

    await until(satisfied)
    await settled(1)
    await peers.queue.set_jobs(created.id)
    await settled(0)


async def test_a_new_endpoint_starts_with_its_initial_count_within_its_bounds(
    run_loop: RunLoop, create: Create, settled: Settled
) -> None:
    run_loop(policy=OUT_NOW)
    assert (await create(num_initial=5, num_min=1, num_max=2, kind="Real-time")).num_workers == 2
    await settled(2)


@pytest.mark.slow
async def test_a_worker_that_is_too_many_is_asked_to_leave(
    run_loop: RunLoop, create: Create, settled: Settled, database: Any
) -> None:
    run_loop(policy=BOTH_NOW)
    created = await create()
    await settled(0)
    ended = await EventStore(database).page_events(created.id, 100, None)
    assert any(event.message.endswith("it was asked to leave and left") for event in ended)


async def test_new_bounds_hold_at_once_and_a_drained_endpoint_comes_back(
    run_loop: RunLoop, create: Create, settled: Settled, domain: Endpoints, store: EndpointStore
) -> None:
    run_loop(policy=ScalingPolicy(out_seconds=NEVER, in_seconds=NEVER))
    created = await create()
    await settled(1)
    await domain.update_endpoint(created.id, Change(num_min=2), ANN)
    await settled(2)
    await domain.update_endpoint(created.id, Change(num_min=0, num_max=1), ANN)
    await settled(1)

    await domain.update_endpoint(created.id, Change(drain=True), ANN)

    async def drained() -> bool:
        (row,) = await store.get_all()
        return (row.status, row.num_live) == ("Draining", 0) and not await store.get_workers()

    await until(drained)
    assert await domain.find_endpoints("", "Async", Viewer("ann", ["painter"])) == []
    assert (await domain.update_endpoint(created.id, Change(drain=False), ANN)).status == "Updating"
    await settled(1)
