"""Tasks and pools on a real control plane: who waits for whom. What all clusters do with tasks is in test_clusters.py.

Needs KUBEBUILDER_ASSETS: `make test-k8s`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest
from kubernetes_asyncio import client

from services.endpoints.cluster import Cluster, Pool
from services.endpoints.peers import Holder
from services.endpoints.rows import State, Task
from services.endpoints.task_control import TaskControl
from services.endpoints.task_store import TaskStore
from tests.services.endpoints.conftest import Peers, until
from tests.services.endpoints.foreman import Foreman, worker_or_task

pytestmark = pytest.mark.k8s

NAMESPACE = "esd-workers"
NUM_GPUS = 4  # of all nodes

Make = Callable[..., Awaitable[tuple[Cluster, Pool]]]


@pytest.fixture
async def full_cluster(
    make_kubernetes: Any, foreman: Foreman, peers: Peers, clients: Any, task_store: TaskStore
) -> AsyncIterator[Make]:
    """Makes a cluster whose GPUs all have a worker, and keeps its tasks as the control loop does."""
    looking: list[asyncio.Task[None]] = []
    pools: list[tuple[Cluster, Pool]] = []

    async def make(gpu_priority: str) -> tuple[Cluster, Pool]:
        cluster: Cluster = await make_kubernetes(worker_or_task(foreman), gpu_priority=gpu_priority)
        pool = Pool(str(uuid4()), "test", "one-gpu")
        pools.append((cluster, pool))
        await cluster.save_secret(pool.endpoint_id, await clients[0].create_secret(Holder.WORKER, pool.endpoint_id))
        await cluster.apply(pool, NUM_GPUS, ())
        await until(lambda: num_live(peers, pool) == NUM_GPUS, seconds=120)
        control = TaskControl(task_store, clients[0], cluster, asyncio.Event())

        async def look() -> None:
            while True:
                await control.look()
                await asyncio.sleep(0.1)

        looking.append(asyncio.create_task(look()))
        return cluster, pool

    yield make
    for cluster, pool in pools:
        await cluster.apply(pool, 0, ())
        await until(lambda pool=pool: num_live(peers, pool) == 0)
        await cluster.forget(pool.endpoint_id)
    for task in looking:
        task.cancel()
    await asyncio.gather(*looking, return_exceptions=True)


def num_live(peers: Peers, pool: Pool) -> int:
    return len(peers.queue.workers.get(pool.endpoint_id, ()))


async def add(store: TaskStore, instance_type: str = "one-gpu", deadline_seconds: int | None = None) -> Task:
    row = Task(
        id=str(uuid4()),
        kind="train",
        service="training",
        instance_type=instance_type,
        max_attempts=1,
        deadline_seconds=deadline_seconds,
        creation_time=datetime.now(UTC),
    )
    return await store.add_task(row)


async def reach(store: TaskStore, task: Task, state: State, words: str = "") -> Task:
    async def found() -> Task | None:
        row = await store.get_task(task.id)
        return row if row.state == state and words in row.reason else None

    row: Task = await until(found, seconds=120)
    return row


async def test_where_pools_go_first_a_task_waits_until_a_worker_has_left(
    full_cluster: Make, foreman: Foreman, task_store: TaskStore, peers: Peers
) -> None:
    cluster, pool = await full_cluster("pools")
    task = await add(task_store)
    await reach(task_store, task, State.WAITING, "it waits for a place: 0/2 nodes are available")
    assert num_live(peers, pool) == NUM_GPUS
    await cluster.apply(pool, NUM_GPUS - 1, ())
    _, end = await foreman.next(task.id)
    await cluster.apply(pool, NUM_GPUS, ())  # the worker that comes back waits: nobody is sent away for it
    end()
    await reach(task_store, task, State.SUCCEEDED)
    await until(lambda: num_live(peers, pool) == NUM_GPUS, seconds=120)


async def test_where_tasks_go_first_a_worker_drains_and_leaves_its_place(
    full_cluster: Make, foreman: Foreman, task_store: TaskStore, peers: Peers
) -> None:
    _, pool = await full_cluster("tasks")
    task = await add(task_store)
    _, end = await foreman.next(task.id)
    await until(lambda: num_live(peers, pool) == NUM_GPUS - 1)
    end()
    await reach(task_store, task, State.SUCCEEDED)
    await until(lambda: num_live(peers, pool) == NUM_GPUS, seconds=120)


async def test_a_task_ends_at_its_deadline_and_leaves_nothing(
    make_kubernetes: Any, nodes: Any, foreman: Foreman, task_store: TaskStore, clients: Any
) -> None:
    cluster: Cluster = await make_kubernetes(foreman.command)
    control = TaskControl(task_store, clients[0], cluster, asyncio.Event())
    task = await add(task_store, "cpu", deadline_seconds=3)

    async def has_failed() -> bool:
        await control.look()
        return (await task_store.get_task(task.id)).is_cleared

    await until(has_failed, seconds=120)
    row = await task_store.get_task(task.id)
    assert (row.state, row.reason) == (State.FAILED, "it took longer than its 3 seconds")
    async with await nodes.client() as api:

        async def is_gone() -> bool:
            core, batch, mine = client.CoreV1Api(api), client.BatchV1Api(api), f"esd/owner={task.id}"
            lists = core.list_namespaced_pod, core.list_namespaced_secret, batch.list_namespaced_job
            return not [item for list_ in lists for item in (await list_(NAMESPACE, label_selector=mine)).items]

        assert await until(is_gone)


async def test_a_task_of_an_instance_type_that_nobody_described_fails_and_names_those_that_are(
    make_kubernetes: Any, task_store: TaskStore, clients: Any
) -> None:
    cluster: Cluster = await make_kubernetes()
    task = await add(task_store, "ml.p2.xlarge")
    await TaskControl(task_store, clients[0], cluster, asyncio.Event()).look()
    failed = await task_store.get_task(task.id)
    assert failed.state == State.FAILED
    assert failed.reason.startswith('instance_type "ml.p2.xlarge" is not known on this cluster; it has cpu, ml.g4dn.')
