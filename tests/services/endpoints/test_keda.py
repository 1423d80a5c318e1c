"""Pools that KEDA scales, on a real control plane: a stand-in reads ScaledObjects and asks the scaler as KEDA does.

What the scaler answers is tested in tests/services/inference/test_scaler.py. Needs KUBEBUILDER_ASSETS: `make test-k8s`.
"""

from __future__ import annotations

import asyncio
import base64
import math
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import grpc
import pytest
import yaml
from kubernetes_asyncio import client
from kubernetes_asyncio.client.exceptions import ApiException

from deploy.kubernetes.make_secrets import make_secrets
from deploy.local.home import Home
from deploy.local.ports import free_port
from esd.inference.v1 import externalscaler_pb2 as pb
from esd.inference.v1 import externalscaler_pb2_grpc as rpc
from services.endpoints.domain import Change, Endpoints, NewEndpoint, Viewer
from services.endpoints.event_store import EventStore
from services.endpoints.reconcile import ControlLoop
from services.endpoints.scaling import ScalingPolicy
from services.endpoints.store import Endpoint, EndpointStore
from services.endpoints.task_control import TaskControl
from services.endpoints.task_store import TaskStore
from services.inference.__main__ import InferenceSettings, keda_door
from services.inference.queue.pool_store import PoolState
from services.inference.queue.scaler import ScalerServicer
from services.inference.signals import Signals
from tests.deploy.control_plane import ControlPlane
from tests.processes import ROOT
from tests.services.endpoints.conftest import Peers, until
from tests.serving import Tokens

pytestmark = pytest.mark.k8s

ANN = Viewer("ann", [])
NAMESPACE = "esd-workers"
COMPONENT = ROOT / "deploy" / "kubernetes" / "components" / "keda"
KEDA = "keda.sh", "v1alpha1", NAMESPACE
# What the cluster has to know of KEDA's kinds; the real definitions say more of their fields.
KINDS = {"ScaledObject": "scaledobjects", "TriggerAuthentication": "triggerauthentications"}


class QueueAsPools:
    """What the stand-in queue knows, in the place of the inference service's tables."""

    def __init__(self, peers: Peers) -> None:
        self._queue = peers.queue

    async def pools(self) -> dict[UUID, PoolState]:
        """The pools with jobs."""
        return {UUID(key): PoolState([], jobs.get("num_queued", 0)) for key, jobs in self._queue.jobs.items()}


class StandInKeda:
    """Does with each ScaledObject what KEDA and the autoscaler that it makes do, without their patience."""

    def __init__(self, api: client.ApiClient) -> None:
        self._custom: Any = client.CustomObjectsApi(api)
        self._core: Any = client.CoreV1Api(api)
        self._apps: Any = client.AppsV1Api(api)

    async def run(self) -> None:
        """Scales until cancelled."""
        while True:
            for found in (await self._custom.list_namespaced_custom_object(*KEDA, "scaledobjects"))["items"]:
                with suppress(ApiException):  # it has just been deleted
                    await self._scale(found)
            await asyncio.sleep(0.2)

    async def _scale(self, found: dict[str, Any]) -> None:
        spec, name = found["spec"], found["metadata"]["name"]
        (trigger,) = spec["triggers"]
        assert trigger["type"] == "external-push"
        pool = pb.ScaledObjectRef(name=name, namespace=NAMESPACE, scaler_metadata=trigger["metadata"])
        credentials = await self._credentials(trigger["authenticationRef"]["name"])
        host, _, port = trigger["metadata"]["scalerAddress"].partition(":")
        options = [("grpc.ssl_target_name_override", host)]
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options) as channel:
            stub = rpc.ExternalScalerStub(channel)
            (metric,) = (await stub.GetMetricSpec(pool)).metric_specs
            request = pb.GetMetricsRequest(scaled_object_ref=pool, metric_name=metric.metric_name)
            (value,) = (await stub.GetMetrics(request)).metric_values
            is_active = (await stub.IsActive(pool)).result
        wanted = math.ceil(value.metric_value_float / metric.target_size_float) if is_active else 0
        wanted = min(max(wanted, spec["minReplicaCount"]), spec["maxReplicaCount"])
        scale = [{"op": "replace", "path": "/spec/replicas", "value": wanted}]
        await self._apps.patch_namespaced_deployment_scale(spec["scaleTargetRef"]["name"], NAMESPACE, scale)

    async def _credentials(self, name: str) -> grpc.ChannelCredentials:
        found = await self._custom.get_namespaced_custom_object(*KEDA, "triggerauthentications", name)
        values = {}
        for source in found["spec"]["secretTargetRef"]:
            secret = await self._core.read_namespaced_secret(source["name"], NAMESPACE)
            values[source["parameter"]] = base64.b64decode(secret.data[source["key"]])
        return grpc.ssl_channel_credentials(values["caCert"], values["tlsClientKey"], values["tlsClientCert"])


def definition(kind: str, plural: str) -> dict[str, Any]:
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {"name": "v1alpha1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    names = {"kind": kind, "plural": plural}
    spec = {"group": "keda.sh", "scope": "Namespaced", "names": names, "versions": [version]}
    return {"metadata": {"name": f"{plural}.keda.sh"}, "spec": spec}


@pytest.fixture
async def keda_address(nodes: ControlPlane, peers: Peers, tokens: Tokens, tmp_path: Path) -> AsyncIterator[str]:
    """A cluster with the component `keda`, a stand-in of KEDA in it, and the scaler; answers the scaler's address."""
    secrets = make_secrets(Home(tmp_path / "home"), "{service}{password}", "", "")
    certificates = tmp_path / "scaler"
    certificates.mkdir()
    for name, content in secrets["scaler"].items():
        (certificates / name).write_bytes(content)
    port = free_port()
    settings = InferenceSettings.model_construct(keda_listen=f"127.0.0.1:{port}", keda_certificates=certificates)
    servicer = ScalerServicer(QueueAsPools(peers), Signals(), asyncio.Event())  # type: ignore[arg-type]
    async with await nodes.client() as api, keda_door(settings, tokens.verifier(), servicer):
        await install(api, secrets["keda"])
        keda = asyncio.create_task(StandInKeda(api).run())
        yield f"inference.esd:{port}"
        keda.cancel()
        await asyncio.gather(keda, return_exceptions=True)


async def install(api: client.ApiClient, keda_files: dict[str, bytes]) -> None:
    """Puts into the cluster what KEDA's installation and the component `keda` put there."""
    for kind, plural in KINDS.items():
        await client.ApiextensionsV1Api(api).create_custom_resource_definition(definition(kind, plural))
    rbac = client.RbacAuthorizationV1Api(api)
    role, binding = yaml.safe_load_all((COMPONENT / "role.yaml").read_text())
    await rbac.create_namespaced_role(NAMESPACE, role)
    await rbac.create_namespaced_role_binding(NAMESPACE, binding)
    data = {name: base64.b64encode(content).decode() for name, content in keda_files.items()}
    await client.CoreV1Api(api).create_namespaced_secret(NAMESPACE, {"metadata": {"name": "esd-keda"}, "data": data})
    custom: Any = client.CustomObjectsApi(api)
    authentication = yaml.safe_load((COMPONENT / "authentication.yaml").read_text())

    async def is_installed() -> bool:
        try:
            await custom.create_namespaced_custom_object(*KEDA, "triggerauthentications", authentication)
            await custom.list_namespaced_custom_object(*KEDA, "scaledobjects")
        except ApiException as error:
            return error.status == 409
        return True

    await until(is_installed)  # a new kind is served a moment later


async def test_keda_scales_a_pool_and_the_own_loop_leaves_it_alone(
    keda_address: str, make_kubernetes: Any, nodes: ControlPlane, store: EndpointStore, task_store: TaskStore,
    database: Any, domain: Endpoints, clients: Any, peers: Peers,
) -> None:  # fmt: skip
    wake = asyncio.Event()
    cluster = await make_kubernetes(on_change=wake.set, has_keda=True, keda_scaler_address=keda_address)
    at_once = ScalingPolicy(out_seconds=0, in_seconds=0)
    tasks = TaskControl(task_store, clients[0], cluster, wake)
    control = ControlLoop(store, database, *clients, cluster, tasks, wake, at_once, scaled_by_cluster=True)
    running = asyncio.create_task(control.run())
    new = NewEndpoint("keda", "Async", "one-gpu", 1, True, 0, 3, ["painter"])
    endpoint = await domain.create_endpoint(new, "ann")

    async def rests_at(num_workers: int, status: str = "InService") -> bool:
        row = await store.get_live(endpoint.id)
        return (row.status, row.num_live, row.num_workers) == (status, num_workers, num_workers)

    async with await nodes.client() as api:
        custom: Any = client.CustomObjectsApi(api)

        async def num_scaled_objects() -> int:
            return len((await custom.list_namespaced_custom_object(*KEDA, "scaledobjects"))["items"])

        await until(lambda: rests_at(0), seconds=120)
        await peers.queue.set_jobs(endpoint.id, num_queued=5)
        await until(lambda: rests_at(2), seconds=120)
        assert await num_scaled_objects() == 1
        await domain.update_endpoint(endpoint.id, Change(drain=True), ANN)
        await until(lambda: drained(store, endpoint), seconds=120)
        assert await num_scaled_objects() == 0
        await domain.update_endpoint(endpoint.id, Change(drain=False, num_min=1), ANN)
        await until(lambda: rests_at(2), seconds=120)
        await peers.queue.set_jobs(endpoint.id)
        await until(lambda: rests_at(1), seconds=120)
        messages = [event.message for event in await EventStore(database).page_events(endpoint.id, 100, None)]
        assert "from 0 to 2 workers: the cluster decided so" in messages
        await store.mark_deleting([endpoint.name])

        async def nothing_is_left() -> bool:
            return not await store.get_all() and not await num_scaled_objects()

        await until(nothing_is_left, seconds=120)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def drained(store: EndpointStore, endpoint: Endpoint) -> bool:
    row = await store.get_live(endpoint.id)
    return (row.status, row.num_live) == ("Draining", 0)
