"""Owns workers that are pods: a Deployment per endpoint, kept by server-side apply and scaled by its subresource.

Whoever runs this may do what deploy/kubernetes/workers/role.yaml lists, in one namespace. Nothing of it is remembered
here that the cluster does not tell again, but for how often a worker had been restarted when it was last seen at work.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import structlog
from kubernetes_asyncio import client, config, watch
from kubernetes_asyncio.client.exceptions import ApiException
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.common.errors import Unavailable
from services.endpoints.cluster import Pool, PoolState, manifests
from services.endpoints.cluster.profiles import AWS_PROFILES, Profile
from services.endpoints.cluster.tail import last_words_in

log = structlog.get_logger()

MAX_FAILURES = 3
_TIMEOUT_SECONDS = 20.0
_WATCH_SECONDS = 300  # then it begins anew: a watch whose connection died silently is noticed
_RETRY_SECONDS = 1.0
_APPLY: dict[str, Any] = {
    "field_manager": manifests.MANAGER,
    "force": True,
    "_content_type": "application/apply-patch+yaml",
    "_request_timeout": _TIMEOUT_SECONDS,
}
_NOT_FOUND, _INVALID = 404, {400, 422}


class KubernetesSettings(BaseSettings):
    """How workers run on a cluster, from ESD_KUBERNETES_….

    `server_url` is the gateway as pods see it; without `kubeconfig` the pod's own service account is used. `profiles`
    (JSON) are added to those of AWS's names. `cache_gib` is what a worker keeps of models on its node's disk.
    """

    model_config = SettingsConfigDict(env_prefix="ESD_KUBERNETES_", extra="ignore", frozen=True)

    namespace: str = "esd-workers"
    image: str
    server_url: str = Field(pattern=r"^https?://[^/]+")
    command: list[str] = Field(default=["python", "-m", "gpu_worker"], min_length=1)
    profiles: dict[str, Profile] = Field(default_factory=dict)
    cache_gib: int = Field(100, ge=1)
    kubeconfig: Path | None = None

    def profile(self, instance_type: str) -> Profile | None:
        """What a worker of this type asks for; None where nobody said."""
        return (AWS_PROFILES | self.profiles).get(instance_type)


class KubernetesCluster:
    """Runs workers as pods. `on_change` is called when one of them changes, while `run` runs."""

    def __init__(
        self, api: client.ApiClient, settings: KubernetesSettings, drain_seconds: float, on_change: Callable[[], None]
    ) -> None:
        # The library's type stubs do not know all of its own arguments.
        self._apps: Any = client.AppsV1Api(api)
        self._core: Any = client.CoreV1Api(api)
        self._policy: Any = client.PolicyV1Api(api)
        self._groups: Any = client.ApisApi(api)
        self._settings = settings
        self._drain_seconds = drain_seconds
        self._on_change = on_change
        self._has_budgets: bool | None = None  # None until discovery has told
        self._budgeted: set[str] = set()  # endpoints whose budget this process has applied
        self._restarts: dict[str, dict[str, int]] = {}  # by endpoint and pod: the count when it was last seen at work

    async def run(self) -> None:
        """Watches the workers until cancelled."""
        while True:
            try:
                async with watch.Watch() as events:
                    pods = self._core.list_namespaced_pod
                    stream = events.stream(
                        pods,
                        self._settings.namespace,
                        label_selector=manifests.MANAGED,
                        timeout_seconds=_WATCH_SECONDS,
                    )
                    async for _ in stream:
                        self._on_change()
            except (ApiException, aiohttp.ClientError, TimeoutError, OSError) as error:
                log.warning("the workers are not watched", error=_sentence(error))
            await asyncio.sleep(_RETRY_SECONDS)  # nothing tells when an API server that is down comes back

    async def has_secret(self, endpoint_id: str) -> bool:
        """Whether the Secret is there."""
        with _told_as_unavailable(), _suppress_not_found():
            await self._core.read_namespaced_secret(
                manifests.name_of(endpoint_id), self._settings.namespace, _request_timeout=_TIMEOUT_SECONDS
            )
            return True
        return False

    async def save_secret(self, endpoint_id: str, secret: str) -> None:
        """Writes the Secret that the pods mount."""
        with _told_as_unavailable():
            name, manifest = manifests.name_of(endpoint_id), manifests.secret(endpoint_id, secret)
            await self._core.patch_namespaced_secret(name, self._settings.namespace, manifest, **_APPLY)

    async def apply(self, pool: Pool, num_workers: int, live: Collection[str]) -> PoolState:
        """Makes the Deployment as it should be, scales it, and counts its pods."""
        with _told_as_unavailable():
            if num_workers:
                try:
                    await self._apply_deployment(pool, num_workers)
                except ApiException as error:
                    if error.status not in _INVALID:
                        raise
                    return PoolState(0, f"the cluster refuses these workers: {_sentence(error)}")
                except UnknownProfileError as error:
                    return PoolState(0, str(error))
            else:
                with _suppress_not_found():
                    await self._scale(pool.endpoint_id, 0)
            pods = await self._pods(pool.endpoint_id)
        num_running = sum(pod.status.phase not in {"Succeeded", "Failed"} for pod in pods)
        failure = self._failure(pool.endpoint_id, pods, live)
        return PoolState(num_running, failure if num_workers else None)

    async def forget(self, endpoint_id: str) -> None:
        """Removes the pool's objects."""
        name, namespace = manifests.name_of(endpoint_id), self._settings.namespace
        with _told_as_unavailable():
            for delete in await self._deletions():
                with _suppress_not_found():
                    await delete(name, namespace, propagation_policy="Background", _request_timeout=_TIMEOUT_SECONDS)
        self._restarts.pop(endpoint_id, None)
        self._budgeted.discard(endpoint_id)

    async def remove_orphans(self, endpoint_ids: Collection[str]) -> None:
        """Removes what was made for endpoints that are none of these, whose rows are lost."""
        with _told_as_unavailable():
            lists = [self._apps.list_namespaced_deployment, self._core.list_namespaced_secret]
            if await self._knows_budgets():
                lists.append(self._policy.list_namespaced_pod_disruption_budget)
            found = [(await list_(self._settings.namespace, label_selector=manifests.MANAGED)).items for list_ in lists]
        owners = {item.metadata.labels.get(manifests.ENDPOINT, "") for items in found for item in items}
        for endpoint_id in owners - set(endpoint_ids) - {""}:
            log.warning("workers of an endpoint that is not known are removed", endpoint_id=endpoint_id)
            await self.forget(endpoint_id)

    async def _apply_deployment(self, pool: Pool, num_workers: int) -> None:
        """A new Deployment begins with one pod, which is never too many here."""
        profile = self._settings.profile(pool.instance_type)
        if profile is None:
            known = ", ".join(sorted({*self._settings.profiles, *AWS_PROFILES}))
            raise UnknownProfileError(
                f'instance_type "{pool.instance_type}" is not known on this cluster; it has {known}'
            )
        own = self._settings
        manifest = manifests.deployment(
            pool, profile, own.image, own.command, own.server_url, own.cache_gib, self._drain_seconds
        )
        name = manifests.name_of(pool.endpoint_id)
        made = await self._apps.patch_namespaced_deployment(name, own.namespace, manifest, **_APPLY)
        if made.spec.replicas != num_workers:
            await self._scale(pool.endpoint_id, num_workers)
        if pool.endpoint_id not in self._budgeted and await self._knows_budgets():
            budget = manifests.disruption_budget(pool.endpoint_id)
            await self._policy.patch_namespaced_pod_disruption_budget(name, own.namespace, budget, **_APPLY)
            self._budgeted.add(pool.endpoint_id)

    async def _scale(self, endpoint_id: str, num_workers: int) -> None:
        await self._apps.patch_namespaced_deployment_scale(
            manifests.name_of(endpoint_id),
            self._settings.namespace,
            {"spec": {"replicas": num_workers}},
            field_manager=f"{manifests.MANAGER}-scale",
            _content_type="application/merge-patch+json",
            _request_timeout=_TIMEOUT_SECONDS,
        )

    async def _pods(self, endpoint_id: str) -> list[Any]:
        listed = await self._core.list_namespaced_pod(
            self._settings.namespace,
            label_selector=f"{manifests.ENDPOINT}={endpoint_id}",
            _request_timeout=_TIMEOUT_SECONDS,
        )
        return list(listed.items)

    async def _knows_budgets(self) -> bool:
        """Whether the cluster has policy/v1 (Kubernetes 1.21 and newer)."""
        if self._has_budgets is None:
            groups = (await self._groups.get_api_versions(_request_timeout=_TIMEOUT_SECONDS)).groups
            self._has_budgets = any(
                version.group_version == "policy/v1" for group in groups for version in group.versions
            )
        return self._has_budgets

    async def _deletions(self) -> list[Callable[..., Awaitable[Any]]]:
        deletions = [self._apps.delete_namespaced_deployment, self._core.delete_namespaced_secret]
        if await self._knows_budgets():
            deletions.append(self._policy.delete_namespaced_pod_disruption_budget)
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
                    failure = _failure_of(ended if worker.state.terminated else worker.last_state.terminated)
        self._restarts[endpoint_id] = now
        return failure


class UnknownProfileError(Exception):
    """The instance type stands for nothing here."""


@asynccontextmanager
async def running(
    settings: KubernetesSettings, drain_seconds: float, on_change: Callable[[], None]
) -> AsyncIterator[KubernetesCluster]:
    """A cluster whose workers are watched while the block runs.

    Raises:
        SystemExit: there is no cluster to speak to.
    """
    async with await _connect(settings) as api, asyncio.TaskGroup() as group:
        cluster = KubernetesCluster(api, settings, drain_seconds, on_change)
        watching = group.create_task(cluster.run())
        try:
            yield cluster
        finally:
            watching.cancel()


async def _connect(settings: KubernetesSettings) -> client.ApiClient:
    configuration = client.Configuration()
    try:
        if settings.kubeconfig is not None:
            await config.load_kube_config(str(settings.kubeconfig), client_configuration=configuration)
        else:
            config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
    except config.ConfigException as error:
        raise SystemExit(
            f"ESD_CLUSTER=kubernetes, but no cluster is known: {error}; set ESD_KUBERNETES_KUBECONFIG outside of one"
        ) from None
    return client.ApiClient(configuration)


def _failure_of(end: Any) -> str:
    words = last_words_in(end.message or "") or "its log is empty"
    return (
        f"a worker failed to start {MAX_FAILURES} times in a row; the last one ended with code {end.exit_code}: {words}"
    )


@contextmanager
def _suppress_not_found() -> Iterator[None]:
    """Goes on behind the block where the object is not there."""
    try:
        yield
    except ApiException as error:
        if error.status != _NOT_FOUND:
            raise


@contextmanager
def _told_as_unavailable() -> Iterator[None]:
    try:
        yield
    except ApiException as error:
        raise Unavailable(f"the cluster refuses: {_sentence(error)}") from error
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise Unavailable(f"the cluster does not answer at present: {_sentence(error)}") from error


def _sentence(error: Exception) -> str:
    """What the API server says, without its headers."""
    if isinstance(error, ApiException):
        with suppress(ValueError, AttributeError, TypeError):
            return str(json.loads(error.body or b"")["message"])
        return f"{error.status} {error.reason}"
    return str(error) or type(error).__name__
