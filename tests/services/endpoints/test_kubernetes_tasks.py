"""Tasks and pools on a real control plane: who waits for whom. What all clusters do with tasks is in test_clusters.py.

Needs KUBEBUILDER_ASSETS: `make test-k8s`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest
from kubernetes_asyncio import client

from services.common.auth import Kind
from services.endpoints.cluster import Cluster, Pool
from services.endpoints.cluster.pods import name_of
from services.endpoints.rows import Task, TaskState
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
    pools: list[tuple[Cluster, Pool]] = []
    async with AsyncExitStack() as stack:

        async def make(gpu_priority: str) -> tuple[Cluster, Pool]:
            cluster: Cluster = await make_kubernetes(worker_or_task(foreman), gpu_priority=gpu_priority)
            pool = Pool(str(uuid4()), "test", "one-gpu")
            pools.append((cluster, pool))
            await cluster.save_secret(pool.endpoint_id, await clients[0].create_secret(Kind.WORKER, pool.endpoint_id))
            await cluster.apply(pool, NUM_GPUS, ())
            await until(lambda: num_live(peers, pool) == NUM_GPUS, seconds=120)
            await stack.enter_async_context(controlled(TaskControl(task_store, clients[0], cluster, asyncio.Event())))
            return cluster, pool

        yield make
        for cluster, pool in pools:
            await cluster.apply(pool, 0, ())
            await until(lambda pool=pool: num_live(peers, pool) == 0)
            await cluster.forget(pool.endpoint_id)


@asynccontextmanager
async def controlled(control: TaskControl) -> AsyncIterator[None]:
    """Tasks are kept as the control loop does it, during the block."""

    async def look() -> None:
        while True:
            await control.reconcile()
            await asyncio.sleep(0.1)

    looking = asyncio.create_task(look())
    try:
        yield
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)


def num_live(peers: Peers, pool: Pool) -> int:
    return len(peers.queue.workers.get(pool.endpoint_id, ()))


async def add(
    store: TaskStore, instance_type: str = "one-gpu", deadline_seconds: int | None = None, max_attempts: int = 1
) -> Task:
    row = Task(
        id=str(uuid4()),
        kind="train",
        service="training",
        instance_type=instance_type,
        max_attempts=max_attempts,
        deadline_seconds=deadline_seconds,
        creation_time=datetime.now(UTC),
    )
    return await store.add_task(row)


async def reach(store: TaskStore, task: Task, state: TaskState, words: str = "") -> Task:
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
    await reach(task_store, task, TaskState.WAITING, "it waits for a place: 0/2 nodes are available")
    assert num_live(peers, pool) == NUM_GPUS
    await cluster.apply(pool, NUM_GPUS - 1, ())
    _, end = await foreman.next(task.id)
    await cluster.apply(pool, NUM_GPUS, ())  # the worker that comes back waits: nobody is sent away for it
    end()
    await reach(task_store, task, TaskState.SUCCEEDED)
    await until(lambda: num_live(peers, pool) == NUM_GPUS, seconds=120)


async def test_where_tasks_go_first_a_worker_drains_and_leaves_its_place(
    full_cluster: Make, foreman: Foreman, task_store: TaskStore, peers: Peers
) -> None:
    _, pool = await full_cluster("tasks")
    task = await add(task_store)
    _, end = await foreman.next(task.id)
    await until(lambda: num_live(peers, pool) == NUM_GPUS - 1)
    end()
    await reach(task_store, task, TaskState.SUCCEEDED)
    await until(lambda: num_live(peers, pool) == NUM_GPUS, seconds=120)


async def test_a_task_ends_at_its_deadline_and_leaves_nothing(
    make_kubernetes: Any, nodes: Any, foreman: Foreman, task_store: TaskStore, clients: Any
) -> None:
    cluster: Cluster = await make_kubernetes(foreman.command)
    control = TaskControl(task_store, clients[0], cluster, asyncio.Event())
    task = await add(task_store, "cpu", deadline_seconds=3)

    async def has_failed() -> bool:
        await control.reconcile()
        return (await task_store.get_task(task.id)).is_cleared

    await until(has_failed, seconds=120)
    row = await task_store.get_task(task.id)
    assert (row.state, row.reason) == (TaskState.FAILED, "it took longer than its 3 seconds")
    async with await nodes.client() as api:

        async def is_gone() -> bool:
            core, batch, mine = client.CoreV1Api(api), client.BatchV1Api(api), f"esd/owner={task.id}"
            lists = core.list_namespaced_pod, core.list_namespaced_secret, batch.list_namespaced_job
            return not [item for list_ in lists for item in (await list_(NAMESPACE, label_selector=mine)).items]

        assert await until(is_gone)


async def test_attempts_that_failed_count_also_when_the_job_that_knew_of_them_is_gone(
    make_kubernetes: Any, nodes: Any, foreman: Foreman, task_store: TaskStore, clients: Any
) -> None:
    """As where the service dies when it has deleted a Job and not made the one that stands in for it."""
    first, second = [
        TaskControl(task_store, clients[0], await make_kubernetes(foreman.command), asyncio.Event()) for _ in range(2)
    ]
    task = await add(task_store, "cpu", max_attempts=2)
    async with controlled(first):
        (await foreman.next(task.id))[1](3, "the loss is nan")
        await foreman.next(task.id)
        await until(lambda: runs_after_failure(task_store, task))
    async with await nodes.client() as api:
        batch: Any = client.BatchV1Api(api)
        await batch.delete_namespaced_job(name_of(task.id), NAMESPACE, propagation_policy="Background")
    async with controlled(second):
        (await foreman.next(task.id))[1](4, "out of memory")
        failed = await reach(task_store, task, TaskState.FAILED)
        await until(lambda: is_cleared(task_store, task))  # and nothing is left of it
    assert (failed.num_attempts, failed.reason) == (2, "it ended with code 4: out of memory")
    assert not foreman.has_met(task.id)


async def runs_after_failure(store: TaskStore, task: Task) -> bool:
    row = await store.get_task(task.id)
    return (row.state, row.num_failed) == (TaskState.RUNNING, 1)


async def is_cleared(store: TaskStore, task: Task) -> bool:
    return (await store.get_task(task.id)).is_cleared


async def test_a_task_of_an_instance_type_that_nobody_described_fails_and_names_those_that_are(
    make_kubernetes: Any, task_store: TaskStore, clients: Any
) -> None:
    cluster: Cluster = await make_kubernetes()
    task = await add(task_store, "ml.p2.xlarge")
    await TaskControl(task_store, clients[0], cluster, asyncio.Event()).reconcile()
    failed = await task_store.get_task(task.id)
    assert failed.state == TaskState.FAILED
    assert failed.reason.startswith('instance_type "ml.p2.xlarge" is not known on this cluster; it has cpu, ml.g4dn.')
