"""Owns workers that are pods: a Deployment per endpoint, kept by server-side apply and scaled by its subresource.

Whoever runs this may do what deploy/kubernetes/workers/role.yaml lists, in one namespace. What runs is read from
informers (informer.py), and what is as it was left needs no request; once in a while all is applied again. Nothing is
remembered here that the cluster does not tell again, but for how often a worker had been restarted when it was last
seen at work.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal

import structlog
from kubernetes_asyncio.client.exceptions import ApiException

from services.endpoints.cluster import MAX_FAILURES, Autoscaling, Pool, PoolStatus, TaskStatus, manifests
from services.endpoints.cluster.informer import Informer
from services.endpoints.cluster.kubernetes_api import (
    APPLY,
    INVALID,
    TIMEOUT_SECONDS,
    KubernetesApi,
    KubernetesSettings,
    UnknownProfileError,
    connect,
    exists,
    ignoring,
    obstacle_of,
    sentence,
    told_as_unavailable,
)
from services.endpoints.cluster.kubernetes_tasks import KubernetesTasks
from services.endpoints.cluster.pods import MANAGED, MANAGER, OWNER, name_of, secret_object
from services.endpoints.cluster.tail import last_words_in, why_given_up
from services.endpoints.rows import Task

log = structlog.get_logger()

_SETTLED_SECONDS = 600.0  # until what nobody was seen to change is looked after again
_KEDA = manifests.KEDA_GROUP, manifests.KEDA_VERSION


@dataclass(frozen=True)
class _Settled:
    """A pool whose Deployment was made for it, and was then of this generation."""

    pool: Pool
    generation: int
    until: float  # the loop's time


class KubernetesCluster:
    """Runs workers as pods and tasks as Jobs, while `run` runs. `on_change` is called when one of them changes."""

    def __init__(self, api: KubernetesApi, has_keda: bool, on_change: Callable[[], None]) -> None:
        self._api = api
        self._deployments = Informer("deployments", api.apps.list_namespaced_deployment, api.namespace, on_change)
        self._pods = Informer("pods", api.core.list_namespaced_pod, api.namespace, on_change)
        self._jobs = Informer("jobs", api.batch.list_namespaced_job, api.namespace, on_change)
        self._tasks = KubernetesTasks(api, self._jobs, self._pods)
        self._has_keda = has_keda
        self._settled: dict[str, _Settled] = {}
        self._has_secret_until: dict[str, float] = {}  # the loop's time
        self._has_budgets: bool | None = None  # None until discovery has told
        self._handed_over: dict[str, bool] = {}  # whether KEDA scales an endpoint, as far as this process knows
        self._restarts: dict[str, dict[str, int]] = {}  # by endpoint and pod: the count when it was last seen at work

    async def run(self) -> None:
        """Follows what happens in the cluster until cancelled."""
        async with asyncio.TaskGroup() as group:
            for informer in (self._deployments, self._pods, self._jobs):
                group.create_task(informer.run())

    async def has_secret(self, owner_id: str) -> bool:
        """Whether the Secret is there."""
        now = asyncio.get_running_loop().time()
        if now < self._has_secret_until.get(owner_id, 0):
            return True
        with told_as_unavailable(), ignoring(HTTPStatus.NOT_FOUND):
            await self._api.core.read_namespaced_secret(
                name_of(owner_id), self._api.namespace, _request_timeout=TIMEOUT_SECONDS
            )
            self._has_secret_until[owner_id] = now + _SETTLED_SECONDS
            return True
        return False

    async def save_secret(self, owner_id: str, secret: str) -> None:
        """Writes the Secret that the pods mount."""
        with told_as_unavailable():
            name, manifest = name_of(owner_id), secret_object(owner_id, secret)
            await self._api.core.patch_namespaced_secret(name, self._api.namespace, manifest, **APPLY)

    async def apply(self, pool: Pool, num_workers: int, live: Collection[str]) -> PoolStatus:
        """Makes the Deployment as it should be, scales it, and counts its pods."""
        with told_as_unavailable():
            if num_workers or pool.autoscaling:
                try:
                    deployment = await self._keep(pool, num_workers)
                except ApiException as error:
                    if error.status not in INVALID:
                        raise
                    return PoolStatus(0, f"the cluster refuses these workers: {sentence(error)}")
                except UnknownProfileError as error:
                    return PoolStatus(0, str(error))
            else:
                deployment = await self._empty(pool.endpoint_id)
            pods = await self._pods.of(pool.endpoint_id)
        num_running = sum(exists(pod) for pod in pods)
        failure = self._failure(pool.endpoint_id, pods, live) if num_workers else None
        obstacle = next(filter(None, (obstacle_of(pod) for pod in pods)), "")
        return PoolStatus(num_running, failure, deployment.spec.replicas if pool.autoscaling else None, obstacle)

    async def apply_task(self, task: Task, should_run: bool) -> TaskStatus:
        """Makes the Job as it should be, and reads what became of it."""
        return await self._tasks.apply(task, should_run)

    async def forget(self, owner_id: str) -> None:
        """Removes the owner's objects."""
        name, namespace = name_of(owner_id), self._api.namespace
        with told_as_unavailable():
            await self._let_go(owner_id)
            for delete in await self._deletions():
                with ignoring(HTTPStatus.NOT_FOUND):
                    await delete(name, namespace, propagation_policy="Background", _request_timeout=TIMEOUT_SECONDS)
        for known in (self._restarts, self._settled, self._has_secret_until, self._handed_over):
            known.pop(owner_id, None)

    async def remove_orphans(self, owner_ids: Collection[str]) -> None:
        """Removes what was made for owners that are none of these, whose rows are lost."""
        lists = [
            self._api.apps.list_namespaced_deployment,
            self._api.batch.list_namespaced_job,
            self._api.core.list_namespaced_secret,
        ]
        with told_as_unavailable():
            if await self._knows_budgets():
                lists.append(self._api.policy.list_namespaced_pod_disruption_budget)
            of_ours = {"label_selector": MANAGED, "_request_timeout": TIMEOUT_SECONDS}
            found = [(await list_(self._api.namespace, **of_ours)).items for list_ in lists]
        known = {item.metadata.labels.get(OWNER, "") for items in found for item in items}
        for owner_id in known - set(owner_ids) - {""}:
            log.warning("what belongs to no endpoint or task that is known is removed", owner_id=owner_id)
            await self.forget(owner_id)

    async def _keep(self, pool: Pool, num_workers: int) -> Any:
        """The pool's Deployment, made as it should be and scaled. A new one has one pod, never too many here."""
        found = await self._deployments.of(pool.endpoint_id)
        deployment = found[0] if found and self._is_settled(pool, found[0]) else await self._apply_deployment(pool)
        if not pool.autoscaling and deployment.spec.replicas != num_workers:
            await self._scale(deployment, num_workers)
        return deployment

    async def _empty(self, endpoint_id: str) -> Any | None:
        """The Deployment of a pool that is to have no worker, if there is one."""
        await self._let_go(endpoint_id)
        found = await self._deployments.of(endpoint_id)
        if not found:
            return None
        if found[0].spec.replicas:
            with ignoring(HTTPStatus.NOT_FOUND):
                await self._scale(found[0], 0)
        return found[0]

    def _is_settled(self, pool: Pool, deployment: Any) -> bool:
        """Whether the Deployment is as it was left for this very pool, not long ago."""
        settled = self._settled.get(pool.endpoint_id)
        return (
            settled is not None
            and (settled.pool, settled.generation) == (pool, deployment.metadata.generation)
            and asyncio.get_running_loop().time() < settled.until
        )

    async def _apply_deployment(self, pool: Pool) -> Any:
        """Applies everything that a pool has but for its number of workers; answers the Deployment."""
        manifest = manifests.deployment(pool, self._api.profile(pool.instance_type), self._api.program())
        name, namespace = name_of(pool.endpoint_id), self._api.namespace
        made = await self._api.apps.patch_namespaced_deployment(name, namespace, manifest, **APPLY)
        if pool.autoscaling:
            await self._hand_over(pool, pool.autoscaling)
        else:
            await self._let_go(pool.endpoint_id)
        if await self._knows_budgets():
            budget = manifests.disruption_budget(pool.endpoint_id)
            await self._api.policy.patch_namespaced_pod_disruption_budget(name, namespace, budget, **APPLY)
        until = asyncio.get_running_loop().time() + _SETTLED_SECONDS
        self._settled[pool.endpoint_id] = _Settled(pool, made.metadata.generation, until)
        self._deployments.put(made)
        return made

    async def _hand_over(self, pool: Pool, scaling: Autoscaling) -> None:
        """Lets KEDA scale the pool."""
        manifest = manifests.scaled_object(pool, scaling, self._api.keda_scaler_address)
        await self._api.custom.patch_namespaced_custom_object(
            *_KEDA, self._api.namespace, manifests.SCALED_OBJECTS, name_of(pool.endpoint_id), manifest, **APPLY
        )
        self._handed_over[pool.endpoint_id] = True

    async def _let_go(self, owner_id: str) -> None:
        """Lets KEDA scale the pool no longer, if it did; after a start of this service that is not known."""
        if self._has_keda and self._handed_over.get(owner_id, True):
            with ignoring(HTTPStatus.NOT_FOUND):
                await self._api.custom.delete_namespaced_custom_object(
                    *_KEDA,
                    self._api.namespace,
                    manifests.SCALED_OBJECTS,
                    name_of(owner_id),
                    _request_timeout=TIMEOUT_SECONDS,
                )
            self._handed_over[owner_id] = False

    async def _scale(self, deployment: Any, num_workers: int) -> None:
        await self._api.apps.patch_namespaced_deployment_scale(
            deployment.metadata.name,
            self._api.namespace,
            {"spec": {"replicas": num_workers}},
            field_manager=f"{MANAGER}-scale",
            _content_type="application/merge-patch+json",
            _request_timeout=TIMEOUT_SECONDS,
        )
        deployment.spec.replicas = num_workers  # in the informer, which will be told the same

    async def _knows_budgets(self) -> bool:
        """Whether the cluster has policy/v1 (Kubernetes 1.21 and newer)."""
        if self._has_budgets is None:
            groups = (await self._api.groups.get_api_versions(_request_timeout=TIMEOUT_SECONDS)).groups
            self._has_budgets = any(
                version.group_version == "policy/v1" for group in groups for version in group.versions
            )
        return self._has_budgets

    async def _deletions(self) -> list[Callable[..., Awaitable[Any]]]:
        deletions = [
            self._api.apps.delete_namespaced_deployment,
            self._api.batch.delete_namespaced_job,
            self._api.core.delete_namespaced_secret,
        ]
        if await self._knows_budgets():
            deletions.append(self._api.policy.delete_namespaced_pod_disruption_budget)
        return deletions

    def _failure(self, endpoint_id: str, pods: list[Any], live: Collection[str]) -> str | None:
        """Why a worker does not start, once it has failed as often in a row as is allowed."""
        seen = self._restarts.get(endpoint_id, {})
        now: dict[str, int] = {}
        failure = None
        for pod in pods:
            for worker in pod.status.container_statuses or ():
                count = worker.restart_count
                name = pod.metadata.name
                now[name] = count if name in live else seen.get(name, count)
                ended = worker.state.terminated or (worker.state.waiting and worker.last_state.terminated)
                waiting = worker.state.waiting
                if waiting and waiting.reason == "InvalidImageName":
                    failure = f"the worker's image {worker.image} has an impossible name"
                elif ended and count - now[name] + 1 >= MAX_FAILURES:
                    failure = why_given_up(ended.exit_code, last_words_in(ended.message))
        self._restarts[endpoint_id] = now
        return failure


@asynccontextmanager
async def running(
    settings: KubernetesSettings,
    drain_seconds: float,
    gpu_priority: Literal["pools", "tasks"],
    has_keda: bool,
    on_change: Callable[[], None],
) -> AsyncIterator[KubernetesCluster]:
    """A cluster whose workers and tasks are watched while the block runs.

    Raises:
        SystemExit: there is no cluster to speak to.
    """
    async with await connect(settings) as api, asyncio.TaskGroup() as group:
        cluster = KubernetesCluster(KubernetesApi(api, settings, drain_seconds, gpu_priority), has_keda, on_change)
        watching = group.create_task(cluster.run())
        try:
            yield cluster
        finally:
            watching.cancel()
