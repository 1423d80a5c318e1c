"""Owns the way to a Kubernetes cluster: its settings, the connection, and what its refusals become."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal

import aiohttp
from kubernetes_asyncio import client, config
from kubernetes_asyncio.client.exceptions import ApiException
from pydantic import Field
from pydantic_settings import SettingsConfigDict

from services.common.errors import Unavailable
from services.common.process import refuse
from services.common.settings import SOME_URLS, URL, FromEnvironment
from services.endpoints.cluster import worker_settings
from services.endpoints.cluster.pods import MANAGER, Program
from services.endpoints.cluster.profiles import AWS_PROFILES, Profile

TIMEOUT_SECONDS = 20.0
APPLY: dict[str, Any] = {
    "field_manager": MANAGER,
    "force": True,
    "_content_type": "application/apply-patch+yaml",
    "_request_timeout": TIMEOUT_SECONDS,
}
INVALID = {HTTPStatus.BAD_REQUEST, HTTPStatus.UNPROCESSABLE_ENTITY}
_LATE = timedelta(seconds=10)  # that a kubelet may be with the end of a pod
# By who goes first: the priority classes of pools and of tasks (deploy/kubernetes/workers/priorities.yaml).
_PRIORITIES = {
    "pools": ("esd-before-others", "esd-after-others"),
    "tasks": ("esd-after-others", "esd-in-place-of-others"),
}


class KubernetesSettings(FromEnvironment):
    """How workers and tasks run on a cluster, from ESD_KUBERNETES_….

    `server_url` is the gateway as pods see it; without `kubeconfig` the pod's own service account is used. `profiles`
    (JSON) are added to those of AWS's names. `cache_gib` is what a worker keeps of models on its node's disk.
    A pod whose node does not answer is replaced after `lost_node_seconds` (Kubernetes' own default is 300).
    `keda_scaler_address` is where KEDA finds the inference service's door for it.
    """

    model_config = SettingsConfigDict(env_prefix="ESD_KUBERNETES_")

    namespace: str = "esd-workers"
    image: str
    server_url: str = Field(pattern=URL, examples=SOME_URLS)
    command: list[str] = Field(default=["python", "-m", "gpu_worker"], min_length=1)
    profiles: dict[str, Profile] = Field(default_factory=dict)
    cache_gib: int = Field(100, ge=1)
    lost_node_seconds: int = Field(30, ge=0)
    keda_scaler_address: str = "inference.esd:9001"
    kubeconfig: Path | None = None


class UnknownProfileError(Exception):
    """The instance type stands for nothing here."""


class KubernetesApi:
    """The parts of the API that are used, and what every pod is made with."""

    def __init__(
        self,
        api: client.ApiClient,
        settings: KubernetesSettings,
        drain_seconds: float,
        gpu_priority: Literal["pools", "tasks"],
    ) -> None:
        # The library's type stubs do not know all of its own arguments.
        self.apps: Any = client.AppsV1Api(api)
        self.core: Any = client.CoreV1Api(api)
        self.batch: Any = client.BatchV1Api(api)
        self.policy: Any = client.PolicyV1Api(api)
        self.groups: Any = client.ApisApi(api)
        self.custom: Any = client.CustomObjectsApi(api)
        self.namespace = settings.namespace
        self.keda_scaler_address = settings.keda_scaler_address
        self._settings = settings
        self._drain_seconds = drain_seconds
        self._priorities = _PRIORITIES[gpu_priority]

    def profile(self, instance_type: str) -> Profile:
        """What a pod of this type asks for.

        Raises:
            UnknownProfileError: nobody said.
        """
        profiles = AWS_PROFILES | self._settings.profiles
        if instance_type not in profiles:
            known = ", ".join(sorted(profiles))
            raise UnknownProfileError(f'instance_type "{instance_type}" is not known on this cluster; it has {known}')
        return profiles[instance_type]

    def program(self, task_kind: str | None = None) -> Program:
        """What a worker runs, or a task of this kind."""
        own = self._settings
        return Program(
            image=own.image,
            command=own.command if task_kind is None else [*own.command, task_kind],
            server_url=own.server_url,
            cache_gib=own.cache_gib,
            drain_seconds=self._drain_seconds,
            lost_node_seconds=own.lost_node_seconds,
            priority_class=self._priorities[task_kind is not None],
            settings=worker_settings(),
        )


def is_lost(pod: Any) -> bool:
    """Whether the pod should be gone by now, and is not, because its node has been lost."""
    gone_by = pod.metadata.deletion_timestamp
    return gone_by is not None and datetime.now(UTC) > gone_by + _LATE


def exists(pod: Any) -> bool:
    """Whether the pod may still do something."""
    return pod.status.phase not in {"Succeeded", "Failed"} and not is_lost(pod)


def obstacle_of(pod: Any) -> str:
    """What a pod waits for before it runs, where the cluster says so: a node, its image, a volume."""
    if pod.status.phase != "Pending":
        return ""
    for condition in pod.status.conditions or ():
        if condition.type == "PodScheduled" and condition.status == "False":
            return f"it waits for a place: {condition.message}"
    for container in pod.status.container_statuses or ():
        if container.state.waiting and container.state.waiting.message:
            return f"it waits: {container.state.waiting.message}"
    return ""


async def connect(settings: KubernetesSettings) -> client.ApiClient:
    """A client for the cluster of the settings.

    Raises:
        SystemExit: there is no cluster to speak to.
    """
    configuration = client.Configuration()
    try:
        if settings.kubeconfig is not None:
            await config.load_kube_config(str(settings.kubeconfig), client_configuration=configuration)
        else:
            config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
    except config.ConfigException as error:
        refuse(
            f"ESD_CLUSTER=kubernetes, but no cluster is known: {error}; set ESD_KUBERNETES_KUBECONFIG outside of one"
        )
    return client.ApiClient(configuration)


@contextmanager
def ignoring(status: HTTPStatus) -> Iterator[None]:
    """Goes on behind the block where the API server answers so: NOT_FOUND, or CONFLICT for what is there already."""
    try:
        yield
    except ApiException as error:
        if error.status != status:
            raise


@contextmanager
def told_as_unavailable() -> Iterator[None]:
    """What only the cluster's state is to blame for becomes Unavailable."""
    try:
        yield
    except ApiException as error:
        raise Unavailable(f"the cluster refuses: {sentence(error)}") from error
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise Unavailable(f"the cluster does not answer at present: {sentence(error)}") from error


def sentence(error: Exception) -> str:
    """What the API server says, without its headers."""
    if isinstance(error, ApiException):
        with suppress(ValueError, AttributeError, TypeError):
            return str(json.loads(error.body or b"")["message"])
        return f"{error.status} {error.reason}"
    return str(error) or type(error).__name__
