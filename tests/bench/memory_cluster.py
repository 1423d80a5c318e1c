"""Rounds of the real control loop with a Kubernetes API in memory, which counts requests and has no delay."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

from kubernetes_asyncio import client
from kubernetes_asyncio.client.exceptions import ApiException

from deploy.local.home import Home
from deploy.local.ports import free_port
from deploy.local.postgres import Postgres
from services.common import logs
from services.common.audit import Audit
from services.common.database import Database
from services.common.settings import Settings
from services.endpoints.cluster.kubernetes import KubernetesCluster
from services.endpoints.cluster.kubernetes_api import KubernetesApi, KubernetesSettings
from services.endpoints.domain import Endpoints, NewEndpoint
from services.endpoints.event_store import EventStore
from services.endpoints.reconcile import ControlLoop
from services.endpoints.scaling import Load, ScalingPolicy
from services.endpoints.store import EndpointStore
from services.endpoints.task_control import TaskControl
from services.endpoints.task_store import TaskStore
from tests.processes import process_environment, running

_NUM_ROUNDS = 10


@dataclass(frozen=True)
class Round:
    """What kind of round, how long such rounds took, the requests of the last one, and how many pools it changed."""

    name: str
    milliseconds: list[float]
    num_requests: int
    num_changes: int = 0


class MemoryApi(KubernetesApi):
    """Deployments with their pods, and Secrets. A pod is running as soon as it is wanted."""

    def __init__(self, api: client.ApiClient, settings: KubernetesSettings) -> None:
        super().__init__(api, settings, drain_seconds=60, gpu_priority="pools")
        self.num_requests = 0
        self.tell: Callable[[Any], None] = lambda pod: None  # the informer of pods
        self._deployments: dict[str, Any] = {}
        self._secrets: set[str] = set()
        self._version = 0
        self.apps = SimpleNamespace(
            patch_namespaced_deployment=self._apply,
            patch_namespaced_deployment_scale=self._scale,
            list_namespaced_deployment=None,
        )
        self.core = SimpleNamespace(
            read_namespaced_secret=self._read_secret, patch_namespaced_secret=self._save, list_namespaced_pod=None
        )
        self.policy = SimpleNamespace(patch_namespaced_pod_disruption_budget=self._count)
        self.groups = SimpleNamespace(get_api_versions=self._discover)

    async def _count(self, *_: Any, **__: Any) -> None:
        self.num_requests += 1

    async def _discover(self, **_: Any) -> Any:
        return SimpleNamespace(groups=[SimpleNamespace(versions=[SimpleNamespace(group_version="policy/v1")])])

    async def _read_secret(self, name: str, *_: Any, **__: Any) -> None:
        self.num_requests += 1
        if name not in self._secrets:
            raise ApiException(status=404)

    async def _save(self, name: str, *_: Any, **__: Any) -> None:
        self.num_requests += 1
        self._secrets.add(name)

    async def _apply(self, name: str, namespace: str, manifest: dict[str, Any], **_: Any) -> Any:
        self.num_requests += 1
        found = self._deployments.setdefault(name, self._object(name, manifest["metadata"]["labels"]))
        self._add_pods(found)
        return found

    async def _scale(self, name: str, namespace: str, scale: dict[str, Any], **_: Any) -> None:
        self.num_requests += 1
        found = self._deployments[name]
        found.spec.replicas = scale["spec"]["replicas"]
        self._add_pods(found)

    def _object(self, name: str, labels: dict[str, str]) -> Any:
        self._version += 1
        metadata = SimpleNamespace(
            name=name, labels=labels, generation=1, resource_version=str(self._version), deletion_timestamp=None
        )
        return SimpleNamespace(metadata=metadata, spec=SimpleNamespace(replicas=1))

    def _add_pods(self, deployment: Any) -> None:
        worker = SimpleNamespace(restart_count=0, state=SimpleNamespace(terminated=None, waiting=None))
        for number in range(deployment.spec.replicas):
            pod = self._object(f"{deployment.metadata.name}-{number}", deployment.metadata.labels)
            pod.status = SimpleNamespace(phase="Running", container_statuses=[worker])
            self.tell(pod)


class _NoIdentity:
    async def create_secret(self, holder: str, owner_id: str) -> str:
        return owner_id


async def rounds_of(num_endpoints: int, num_workers: int, folder: Path) -> list[Round]:
    """Rounds with so many endpoints of so many workers each: the first, quiet ones, and ones in which pools change."""
    server = Postgres(Home(folder / "home"), free_port())
    server.prepare()
    with running(server.command(), process_environment()):
        server.wait_until_up()
        server.bootstrap(["endpoints"])
        logs.configure("bench", Settings(log_level="error"))
        database = Database(server.url("endpoints"))
        await database.migrate("endpoints")
        async with client.ApiClient() as api:
            found = await _rounds(database, api, num_endpoints, num_workers)
        await database.dispose()
        return found


async def _rounds(database: Database, api: client.ApiClient, num_endpoints: int, num_workers: int) -> list[Round]:
    store, tasks = (
        EndpointStore(database, Audit("endpoints", "of no use to anybody, and long enough")),
        TaskStore(database),
    )
    memory = MemoryApi(api, KubernetesSettings(image="worker:1", server_url="http://gateway:8080"))
    wake = asyncio.Event()
    cluster = KubernetesCluster(memory, False, wake.set)
    memory.tell = cluster._pods.put
    for informer in (cluster._deployments, cluster._pods, cluster._jobs):
        informer._is_fresh.set()
    nobody: Any = _NoIdentity()
    policy = ScalingPolicy(out_seconds=0)
    control = ControlLoop(
        store, database, nobody, nobody, cluster, TaskControl(tasks, nobody, cluster, wake), wake, policy
    )
    domain = Endpoints(store, EventStore(database), nobody, nobody, max_workers=num_workers)
    new = [
        NewEndpoint("", "Async", "ml.g5.xlarge", num_workers - 1, True, num_workers - 1, num_workers, [str(uuid4())])
        for _ in range(num_endpoints)
    ]
    for endpoint in new:
        await domain.create_endpoint(endpoint, "bench")

    async def measure(num_busy: int = 0) -> tuple[float, int]:
        """One round, in which so many pools need all their workers."""
        rows = await store.get_all()
        loads = {}
        for index, row in enumerate(rows):
            pods = await cluster._pods.of(row.id)
            num_jobs = 1000 if index < num_busy else 1
            loads[row.id] = Load(frozenset(pod.metadata.name for pod in pods), num_jobs, 0)
        control.hear(loads)
        before, began = memory.num_requests, time.perf_counter()
        await control.reconcile()
        return 1000 * (time.perf_counter() - began), memory.num_requests - before

    first = await measure()
    while {row.status for row in await store.get_all()} != {"InService"}:
        await measure()
    quiet = [await measure() for _ in range(_NUM_ROUNDS)]
    num_busy = max(1, num_endpoints // 20)
    busy = await measure(num_busy)
    after = await measure(num_busy)
    workers = f"{num_endpoints} endpoints, {num_endpoints * (num_workers - 1):,} workers"
    return [
        Round(f"the first: everything is made ({workers})", [first[0]], first[1]),
        Round("nothing changes", [found[0] for found in quiet], quiet[-1][1]),
        Round(f"{num_busy} pools grow", [busy[0]], busy[1], num_busy),
        Round("the round after", [after[0]], after[1]),
    ]
