"""A Kubernetes cluster beside the stack: a real control plane, and nodes whose pods are processes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from kubernetes_asyncio import client

from services.endpoints.cluster.pods import OWNER
from tests.deploy.control_plane import ControlPlane, account_token, control_plane, prepare
from tests.deploy.process_kubelet import ProcessKubelet

NAMESPACE = "esd-workers"
PATIENCE = 240  # seconds, on a busy machine


class Site:
    """A control plane and nodes, on an event loop in a thread of its own, since REST's side of the test waits."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._stack = AsyncExitStack()
        self.nodes: dict[str, ProcessKubelet] = {}

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Runs something there and answers its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(120)

    def start(self) -> None:
        """Starts everything; `kubeconfig` is that of the endpoints service's account."""
        self._thread.start()
        self.do(self._start())

    async def _start(self) -> None:
        self.plane: ControlPlane = await self._stack.enter_async_context(control_plane(self._folder))
        self.api = await self._stack.enter_async_context(await self.plane.client())
        await prepare(self.api)
        for name in ("node-1", "node-2"):
            await self.add_node(name)
        self.kubeconfig = self.plane.kubeconfig(await account_token(self.plane))

    async def add_node(self, name: str) -> None:
        """A node joins."""
        self.nodes[name] = ProcessKubelet(self.api, name, 2, self._folder)
        await self._stack.enter_async_context(self.nodes[name])

    def stop(self) -> None:
        """Stops everything."""
        self.do(self._stack.aclose())
        self.do(self._loop.shutdown_asyncgens())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def pods(self, owner_id: str) -> list[Any]:
        """The endpoint's or training's pods that are not on their way out."""
        core: Any = client.CoreV1Api(self.api)
        found = self.do(core.list_namespaced_pod(NAMESPACE, label_selector=f"{OWNER}={owner_id}")).items
        return [pod for pod in found if not pod.metadata.deletion_timestamp]

    def evict(self, pod: Any) -> None:
        """Has a pod leave, as the drain of its node does."""
        version = "policy/v1" if self.plane.has_budgets else "policy/v1beta1"
        name = pod.metadata.name
        body = {"apiVersion": version, "kind": "Eviction", "metadata": {"name": name, "namespace": NAMESPACE}}
        core: Any = client.CoreV1Api(self.api)
        self.do(core.create_namespaced_pod_eviction(name, NAMESPACE, body))

    def delete(self, pod: Any) -> None:
        """Deletes a pod without any grace."""
        core: Any = client.CoreV1Api(self.api)
        self.do(core.delete_namespaced_pod(pod.metadata.name, NAMESPACE, grace_period_seconds=0))

    def kill(self, pod: Any) -> None:
        """Kills a pod's process."""

        async def kill() -> None:
            self.nodes[pod.spec.node_name].kill(pod)

        self.do(kill())

    def come_back(self, node: ProcessKubelet) -> None:
        """A node that was away is there again."""

        async def come_back() -> None:
            node.come_back()

        self.do(come_back())

    def objects(self) -> list[str]:
        """What there is of all endpoints, by kind and name."""
        core, apps = client.CoreV1Api(self.api), client.AppsV1Api(self.api)
        lists = {
            "Deployment": apps.list_namespaced_deployment,
            "ReplicaSet": apps.list_namespaced_replica_set,
            "Pod": core.list_namespaced_pod,
            "Job": client.BatchV1Api(self.api).list_namespaced_job,
            "Secret": core.list_namespaced_secret,
        }
        found = {kind: self.do(list_(NAMESPACE, label_selector=OWNER)).items for kind, list_ in lists.items()}
        return [f"{kind} {item.metadata.name}" for kind, items in found.items() for item in items]

    def without_api(self, meanwhile: Callable[[], None]) -> None:
        """The API server is gone while this happens."""

        async def away() -> None:
            async with self.plane.without_api():
                await asyncio.to_thread(meanwhile)

        self.do(away())
