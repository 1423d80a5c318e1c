"""Endpoints on a real control plane: from the row to the pod and back to nothing, and what the service may do there.

Needs KUBEBUILDER_ASSETS: `make test-k8s`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from kubernetes_asyncio import client

from services.common.auth import Kind
from services.common.database import Database
from services.endpoints.cluster import Cluster, Pool
from services.endpoints.cluster.pods import OWNER, name_of
from services.endpoints.domain import Endpoints, NewEndpoint
from services.endpoints.event_store import EventStore
from services.endpoints.peers import Identity, Queue
from services.endpoints.reconcile import ControlLoop
from services.endpoints.rows import Endpoint
from services.endpoints.scaling import ScalingPolicy
from services.endpoints.store import EndpointStore
from services.endpoints.task_control import TaskControl
from services.endpoints.task_store import TaskStore
from tests.deploy.control_plane import ControlPlane, account_token
from tests.deploy.process_kubelet import ProcessKubelet
from tests.services.endpoints.conftest import STANDIN_WORKER, Peers, until

pytestmark = pytest.mark.k8s

NAMESPACE = "esd-workers"

RunOnKubernetes = Callable[..., Awaitable[Cluster]]


@pytest.fixture
async def api(nodes: ControlPlane) -> AsyncIterator[client.ApiClient]:
    """The administrator's client."""
    async with await nodes.client() as api:
        yield api


@pytest.fixture
async def run_on_kubernetes(
    make_kubernetes: Any,
    store: EndpointStore,
    task_store: TaskStore,
    database: Database,
    clients: tuple[Identity, Queue],
) -> AsyncIterator[RunOnKubernetes]:
    """Starts a control loop whose workers are pods that run this command."""
    loops: list[asyncio.Task[None]] = []

    async def run(command: list[str] = STANDIN_WORKER, policy: ScalingPolicy | None = None) -> Cluster:
        wake = asyncio.Event()
        cluster: Cluster = await make_kubernetes(command, wake.set)
        tasks = TaskControl(task_store, clients[0], cluster, wake)
        control = ControlLoop(store, database, *clients, cluster, tasks, wake, policy or ScalingPolicy())
        loops.append(asyncio.create_task(control.run()))
        return cluster

    yield run
    for loop in loops:
        loop.cancel()
    await asyncio.gather(*loops, return_exceptions=True)


@pytest.fixture
def create(domain: Endpoints) -> Callable[..., Awaitable[Endpoint]]:
    async def make(instance_type: str, num_workers: int = 1) -> Endpoint:
        new = NewEndpoint("test", "Async", instance_type, num_workers, False, 0, 1, ["painter"])
        return await domain.create_endpoint(new, "ann")

    return make


async def in_status(store: EndpointStore, status: str, num_live: int) -> Endpoint:
    async def found() -> list[Endpoint]:
        return [row for row in await store.get_all() if (row.status, row.num_live) == (status, num_live)]

    rows: list[Endpoint] = await until(found, seconds=150)
    return rows[0]


async def objects_of(api: client.ApiClient, endpoint_id: str) -> dict[str, list[Any]]:
    """What the cluster has of an endpoint, by kind."""
    apps, core = client.AppsV1Api(api), client.CoreV1Api(api)
    lists = {
        "Deployment": apps.list_namespaced_deployment,
        "ReplicaSet": apps.list_namespaced_replica_set,
        "Pod": core.list_namespaced_pod,
        "Secret": core.list_namespaced_secret,
    }
    label = f"{OWNER}={endpoint_id}"
    return {kind: list((await list_(NAMESPACE, label_selector=label)).items) for kind, list_ in lists.items()}


async def test_an_endpoint_is_served_by_a_pod_and_leaves_nothing_when_it_is_deleted(
    run_on_kubernetes: RunOnKubernetes, create: Any, store: EndpointStore, peers: Peers, api: client.ApiClient
) -> None:
    await run_on_kubernetes()
    endpoint = await create("cpu")
    await in_status(store, "InService", num_live=1)
    found = await objects_of(api, endpoint.id)
    assert [pod.metadata.name for pod in found["Pod"]] == list(peers.queue.workers[endpoint.id])
    assert {kind: len(items) for kind, items in found.items()} == dict.fromkeys(found, 1)
    await store.mark_deleting([endpoint.name])

    async def nothing_is_left() -> bool:
        return not await store.get_all() and not any((await objects_of(api, endpoint.id)).values())

    assert await until(nothing_is_left)
    assert peers.identity.secrets == {}


async def test_workers_share_out_the_gpus_of_the_nodes_and_one_too_many_waits(
    run_on_kubernetes: RunOnKubernetes, create: Any, store: EndpointStore, api: client.ApiClient, database: Database
) -> None:
    cluster = await run_on_kubernetes()
    endpoint = await create("one-gpu", num_workers=5)
    await in_status(store, "InService", num_live=4)

    async def told() -> list[str]:
        events = await EventStore(database).page_events(endpoint.id, 100, None)
        return [event.message for event in events if event.type == "WorkerWaits"]

    assert (await until(told))[0].startswith("a worker has not started: it waits for a place: 0/2 nodes are available")
    pods = (await objects_of(api, endpoint.id))["Pod"]
    assert sorted(pod.spec.node_name or "" for pod in pods) == ["", "node-1", "node-1", "node-2", "node-2"]
    await store.mark_deleting([endpoint.name])
    await until(lambda: gone(store))
    assert not await cluster.has_secret(endpoint.id)


async def gone(store: EndpointStore) -> bool:
    return not await store.get_all()


async def test_a_pod_that_vanishes_is_replaced(
    run_on_kubernetes: RunOnKubernetes, create: Any, store: EndpointStore, peers: Peers, api: client.ApiClient
) -> None:
    await run_on_kubernetes()
    endpoint = await create("one-gpu")
    await in_status(store, "InService", num_live=1)
    (first,) = peers.queue.workers[endpoint.id]
    await client.CoreV1Api(api).delete_namespaced_pod(first, NAMESPACE)

    def replaced() -> bool:
        return len(peers.queue.workers[endpoint.id] - {first}) == 1

    assert await until(replaced)
    await store.mark_deleting([endpoint.name])
    await until(lambda: gone(store))


async def test_an_instance_type_that_nobody_described_fails_the_endpoint_and_names_those_that_are(
    run_on_kubernetes: RunOnKubernetes, create: Any, store: EndpointStore, api: client.ApiClient
) -> None:
    await run_on_kubernetes()
    endpoint = await create("ml.p2.xlarge")
    failed = await in_status(store, "Failed", num_live=0)
    assert failed.error is not None
    assert failed.error.startswith('instance_type "ml.p2.xlarge" is not known on this cluster; it has cpu, ml.g4dn.')
    assert not (await objects_of(api, endpoint.id))["Deployment"]
    await store.mark_deleting([endpoint.name])
    await until(lambda: gone(store))


async def test_what_somebody_changed_by_hand_is_put_right(
    make_kubernetes: Any, nodes: ControlPlane, api: client.ApiClient
) -> None:
    cluster: Cluster = await make_kubernetes()
    pool = Pool("by-hand", "test", "one-gpu")
    await cluster.save_secret(pool.endpoint_id, "a secret that nobody knows")
    await cluster.apply(pool, 1, ())
    apps: Any = client.AppsV1Api(api)
    name = name_of(pool.endpoint_id)
    change = [{"op": "replace", "path": "/spec/template/spec/containers/0/image", "value": "other:1"}]
    await apps.patch_namespaced_deployment(name, NAMESPACE, change)
    await apps.patch_namespaced_deployment_scale(
        name, NAMESPACE, [{"op": "replace", "path": "/spec/replicas", "value": 9}]
    )

    async def put_right() -> bool:
        await cluster.apply(pool, 1, ())
        found = await apps.read_namespaced_deployment(name, NAMESPACE)
        return (found.spec.template.spec.containers[0].image, found.spec.replicas) == ("worker:1", 1)

    assert await until(put_right)
    await cluster.forget(pool.endpoint_id)


REFUSED = [
    ("esd", "", "secrets", "get"),
    ("esd", "", "secrets", "list"),
    ("esd", "apps", "deployments", "patch"),
    ("default", "apps", "deployments", "create"),
    (NAMESPACE, "", "pods", "create"),
    (NAMESPACE, "", "pods", "delete"),
    (NAMESPACE, "", "pods/exec", "create"),
    (NAMESPACE, "", "serviceaccounts/token", "create"),
    (NAMESPACE, "rbac.authorization.k8s.io", "roles", "patch"),
    (NAMESPACE, "rbac.authorization.k8s.io", "rolebindings", "create"),
    ("", "", "nodes", "list"),
    ("", "", "namespaces", "delete"),
]


async def test_the_service_account_may_not_do_what_it_does_not_need(nodes: ControlPlane) -> None:
    async with await nodes.client(await account_token(nodes)) as own:
        reviews: Any = client.AuthorizationV1Api(own)

        async def may(namespace: str, group: str, resource: str, verb: str) -> bool:
            kind, _, subresource = resource.partition("/")
            wish = {"namespace": namespace, "group": group, "resource": kind, "subresource": subresource, "verb": verb}
            review = {"spec": {"resourceAttributes": wish}}
            return bool((await reviews.create_self_subject_access_review(review)).status.allowed)

        assert await may(NAMESPACE, "apps", "deployments/scale", "patch")
        assert [wish for wish in REFUSED if await may(*wish)] == []


async def test_a_third_node_takes_the_worker_that_waited(
    make_kubernetes: Any, nodes: ControlPlane, api: client.ApiClient, peers: Peers, clients: Any, tmp_path: Path
) -> None:
    cluster: Cluster = await make_kubernetes()
    pool = Pool(str(uuid4()), "test", "one-gpu")
    await cluster.save_secret(pool.endpoint_id, await clients[0].create_secret(Kind.WORKER, pool.endpoint_id))
    await cluster.apply(pool, 5, ())

    def live() -> int:
        return len(peers.queue.workers.get(pool.endpoint_id, ()))

    await until(lambda: live() == 4)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(ProcessKubelet(api, "node-3", 1, tmp_path))
        assert await until(lambda: live() == 5)
        await cluster.apply(pool, 0, ())
        await until(lambda: live() == 0)
    await cluster.forget(pool.endpoint_id)
