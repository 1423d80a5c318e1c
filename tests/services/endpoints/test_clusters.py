"""What every cluster does, with real workers: one body for processes of this machine and for pods.

The second needs a control plane (KUBEBUILDER_ASSETS, see tests/deploy/kube-assets.sh) and is left out without one.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from services.common.auth import Kind
from services.endpoints.cluster import Cluster, Pool, PoolStatus
from services.endpoints.cluster.local import LocalCluster
from services.endpoints.cluster.machine import LocalSettings
from services.endpoints.peers import Identity
from services.endpoints.rows import Endpoint, Task, TaskState
from services.endpoints.store import EndpointStore
from services.endpoints.task_control import TaskControl
from services.endpoints.task_store import TaskStore
from tests.services.endpoints.conftest import STANDIN_WORKER, Peers, until
from tests.services.endpoints.foreman import Foreman

UNLUCKY_WORKER = [sys.executable, "-c", "import sys; sys.exit('no luck today')"]
MakeCluster = Callable[..., Awaitable[Cluster]]


@pytest.fixture
async def pool(store: EndpointStore) -> Pool:
    """A pool whose endpoint has a row."""
    row = Endpoint(
        id=str(uuid4()),
        name="test",
        type="Async",
        instance_type="one-gpu",
        autoscaling=False,
        num_initial=1,
        num_min=0,
        num_max=1,
        num_workers=1,
        owners=[],
        creator="ann",
        start_time=datetime.now(UTC),
    )
    await store.add_endpoint(row)
    return Pool(row.id, row.name, row.instance_type)


@pytest.fixture(params=["make_local", pytest.param("make_kubernetes", marks=pytest.mark.k8s)])
def make_cluster(request: pytest.FixtureRequest) -> MakeCluster:
    """Makes a cluster whose workers run this command; a second one is another control loop's view of the same."""
    make: MakeCluster = request.getfixturevalue(request.param)
    return make


@pytest.fixture
async def make_local(
    store: EndpointStore, task_store: TaskStore, peers: Peers, tmp_path: Path
) -> AsyncIterator[MakeCluster]:
    made: list[LocalCluster] = []

    async def make(command: list[str] = STANDIN_WORKER) -> Cluster:
        settings = LocalSettings(
            command=command,
            folder=tmp_path / "workers",
            server_url=f"http://{peers.address}",
            verifying_key_file=tmp_path / "verifying.pem",
            device="cpu",
            gpus=[],
            drain_seconds=5,
            leave_seconds=5,
        )
        made.append(LocalCluster(store, task_store, settings, lambda: None))
        return made[-1]

    yield make
    for cluster in made:
        cluster.close()


class Driver:
    """Does what the control loop does: applies again and again, with what the queue sees."""

    def __init__(self, cluster: Cluster, pool: Pool, peers: Peers) -> None:
        self._cluster, self._pool, self._peers = cluster, pool, peers

    def live(self) -> set[str]:
        """The workers that reached the queue."""
        return self._peers.queue.workers.get(self._pool.endpoint_id, set())

    async def apply(self, num_workers: int) -> PoolStatus:
        return await self._cluster.apply(self._pool, num_workers, self.live())

    async def until(self, num_workers: int) -> PoolStatus:
        """Applies until so many workers run, and as many have reached the queue."""

        async def reached() -> PoolStatus | None:
            state = await self.apply(num_workers)
            return state if state.num_running == len(self.live()) == num_workers else None

        state: PoolStatus = await until(reached, seconds=120)
        return state


@pytest.fixture
def give_secret(clients: tuple[Identity, Any], pool: Pool) -> Callable[[Cluster], Awaitable[None]]:
    async def give(cluster: Cluster) -> None:
        await cluster.save_secret(pool.endpoint_id, await clients[0].create_secret(Kind.WORKER, pool.endpoint_id))

    return give


async def test_workers_come_and_go_as_they_are_asked_for(
    make_cluster: MakeCluster, pool: Pool, peers: Peers, give_secret: Any
) -> None:
    cluster = await make_cluster()
    driver = Driver(cluster, pool, peers)
    assert not await cluster.has_secret(pool.endpoint_id)
    await give_secret(cluster)
    assert await cluster.has_secret(pool.endpoint_id)
    for num_workers in (1, 2, 1, 0):
        assert await driver.until(num_workers) == PoolStatus(num_workers)
    await cluster.forget(pool.endpoint_id)
    assert not await cluster.has_secret(pool.endpoint_id)
    await cluster.forget(pool.endpoint_id)  # there is nothing left, and nothing to complain about


async def test_two_control_loops_make_one_set_of_workers(
    make_cluster: MakeCluster, pool: Pool, peers: Peers, give_secret: Any
) -> None:
    one, other = await make_cluster(), await make_cluster()
    await give_secret(one)
    await asyncio.gather(*(cluster.apply(pool, 1, ()) for cluster in (one, other)))
    assert await Driver(other, pool, peers).until(1) == await Driver(one, pool, peers).until(1)
    await Driver(other, pool, peers).until(0)
    await one.forget(pool.endpoint_id)


async def test_a_worker_that_does_not_start_is_given_up_with_its_last_words(
    make_cluster: MakeCluster, pool: Pool, peers: Peers, give_secret: Any
) -> None:
    cluster = await make_cluster(UNLUCKY_WORKER)
    await give_secret(cluster)
    driver = Driver(cluster, pool, peers)

    async def failure() -> str | None:
        return (await driver.apply(1)).failure

    reason = "a worker failed to start 3 times in a row; the last one ended with code 1: no luck today"
    assert await until(failure) == reason
    await driver.until(0)
    await cluster.forget(pool.endpoint_id)


async def test_what_belongs_to_no_endpoint_is_removed(make_cluster: MakeCluster, pool: Pool, give_secret: Any) -> None:
    cluster = await make_cluster()
    await give_secret(cluster)
    await cluster.remove_orphans([pool.endpoint_id])
    assert await cluster.has_secret(pool.endpoint_id)
    await cluster.remove_orphans([])
    assert not await cluster.has_secret(pool.endpoint_id)


Begin = Callable[..., Awaitable[Task]]
Reach = Callable[..., Awaitable[Task]]


@pytest.fixture
async def begin(
    make_cluster: MakeCluster, task_store: TaskStore, clients: tuple[Identity, Any], foreman: Foreman
) -> AsyncIterator[Begin]:
    """Asks for a task, and does for it what the control loop does until the end of the test."""
    cluster = await make_cluster(foreman.command)
    control = TaskControl(task_store, clients[0], cluster, asyncio.Event())

    async def look() -> None:
        while True:
            await control.reconcile()
            await asyncio.sleep(0.1)

    async def add(instance_type: str = "one-gpu", max_attempts: int = 1) -> Task:
        row = Task(
            id=str(uuid4()),
            kind="train",
            service="training",
            instance_type=instance_type,
            max_attempts=max_attempts,
            creation_time=datetime.now(UTC),
        )
        return await task_store.add_task(row)

    looking = asyncio.create_task(look())
    yield add
    looking.cancel()
    await asyncio.gather(looking, return_exceptions=True)


@pytest.fixture
def reach(task_store: TaskStore) -> Reach:
    """Waits until the task is in the state, and cleared if that is its end."""

    async def wait(task: Task, state: TaskState, words: str = "") -> Task:
        async def found() -> Task | None:
            row = await task_store.get_task(task.id)
            return row if row.state == state and row.is_cleared == row.has_ended and words in row.reason else None

        row: Task = await until(found, seconds=120)
        return row

    return wait


async def test_a_task_runs_to_its_end_with_a_secret_of_its_own(
    begin: Begin, reach: Reach, foreman: Foreman, peers: Peers
) -> None:
    task = await begin()
    said, end = await foreman.next(task.id)
    assert (said["word"], said["secret"]) == ("train", peers.identity.trainers[task.id])
    await reach(task, TaskState.RUNNING)
    end()
    assert (await reach(task, TaskState.SUCCEEDED)).num_attempts == 1
    assert peers.identity.trainers == {}


async def test_a_task_that_fails_is_begun_again_as_often_as_it_may(
    begin: Begin, reach: Reach, foreman: Foreman
) -> None:
    task = await begin(max_attempts=2)
    (await foreman.next(task.id))[1](3, "the loss is nan")
    os.kill((await foreman.next(task.id))[0]["pid"], signal.SIGKILL)
    failed = await reach(task, TaskState.FAILED)
    assert (failed.num_attempts, failed.reason) == (2, "it was ended by signal 9: its log is empty")


async def test_a_task_that_is_stopped_leaves_and_is_not_begun_again(
    begin: Begin, reach: Reach, foreman: Foreman, task_store: TaskStore
) -> None:
    task = await begin(max_attempts=2)
    await foreman.next(task.id)
    await task_store.request_stop(task.id)
    await reach(task, TaskState.STOPPED)
    assert not foreman.has_met(task.id)
