"""Pools that KEDA scales, on a real control plane: a stand-in reads ScaledObjects and asks the scaler as KEDA does.

What the scaler answers is tested in tests/services/inference/test_scaler.py. Needs KUBEBUILDER_ASSETS: `make test-k8s`.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import grpc
import pytest
import yaml
from aiohttp import web
from kubernetes_asyncio import client
from kubernetes_asyncio.client.exceptions import ApiException

from deploy.kubernetes.make_secrets import make_secrets
from deploy.local.home import Home
from deploy.local.ports import free_port
from esd.inference.v1 import externalscaler_pb2 as pb
from esd.inference.v1 import externalscaler_pb2_grpc as rpc
from services.common.notifications import Notifications
from services.common.viewer import Viewer
from services.endpoints.cluster.pods import name_of
from services.endpoints.domain import Change, Endpoints, NewEndpoint
from services.endpoints.event_store import EventStore
from services.endpoints.reconcile import ControlLoop
from services.endpoints.rows import Endpoint
from services.endpoints.scaling import ScalingPolicy
from services.endpoints.store import EndpointStore
from services.endpoints.task_control import TaskControl
from services.endpoints.task_store import TaskStore
from services.inference.__main__ import InferenceSettings, keda_door
from services.inference.queue.pool_store import PoolState
from services.inference.queue.scaler import ScalerServicer
from tests.deploy.control_plane import ControlPlane, account_token
from tests.processes import ROOT
from tests.services.endpoints.conftest import Peers, until
from tests.serving import Tokens

pytestmark = pytest.mark.k8s

ANN = Viewer("ann", [])
NAMESPACE = "esd-workers"
COMPONENT = ROOT / "deploy" / "kubernetes" / "components" / "keda"


class QueueAsPools:
    """What the stand-in queue knows, in the place of the inference service's tables."""

    def __init__(self, peers: Peers) -> None:
        self._queue = peers.queue

    async def pools(self) -> dict[UUID, PoolState]:
        """The pools with jobs."""
        return {UUID(key): PoolState([], jobs.get("num_queued", 0)) for key, jobs in self._queue.jobs.items()}


class KedaObjects:
    """The part of the API server that knows KEDA's kinds, in memory: Kubernetes 1.20, which the tests can build for
    themselves, dies of custom resources when it is compiled by a Go of today (reflect2 and maps)."""

    def __init__(self) -> None:
        self.scaled: dict[str, dict[str, Any]] = {}

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[client.CustomObjectsApi]:
        """A client of it, during the block."""
        app = web.Application()
        path = f"/apis/keda.sh/v1alpha1/namespaces/{NAMESPACE}/scaledobjects/{{name}}"
        app.add_routes([web.patch(path, self._apply), web.delete(path, self._delete)])
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", free_port())
        await site.start()
        async with client.ApiClient(client.Configuration(host=site.name)) as api:
            yield client.CustomObjectsApi(api)
        await runner.cleanup()

    async def _apply(self, request: web.Request) -> web.Response:
        assert request.content_type == "application/apply-patch+yaml"
        assert request.query["fieldManager"] == "esd-endpoints"
        found = json.loads(await request.text())
        assert (found["apiVersion"], found["kind"]) == ("keda.sh/v1alpha1", "ScaledObject")
        self.scaled[request.match_info["name"]] = found
        return web.json_response(found)

    async def _delete(self, request: web.Request) -> web.Response:
        found = self.scaled.pop(request.match_info["name"], None)
        return web.json_response({}, status=404 if found is None else 200)


class StandInKeda:
    """Does with each ScaledObject what KEDA and the autoscaler that it makes do, without their patience."""

    def __init__(self, api: client.ApiClient, objects: KedaObjects) -> None:
        self._objects = objects
        self._core: Any = client.CoreV1Api(api)
        self._apps: Any = client.AppsV1Api(api)
        self._authentication = yaml.safe_load((COMPONENT / "authentication.yaml").read_text())

    async def run(self) -> None:
        """Scales until cancelled."""
        while True:
            for found in list(self._objects.scaled.values()):
                with suppress(ApiException):  # its Deployment has just been deleted
                    await self._scale(found)
            await asyncio.sleep(0.2)

    async def _scale(self, found: dict[str, Any]) -> None:
        spec, name = found["spec"], found["metadata"]["name"]
        (trigger,) = spec["triggers"]
        assert trigger["type"] == "external-push"
        pool = pb.ScaledObjectRef(name=name, namespace=NAMESPACE, scaler_metadata=trigger["metadata"])
        assert trigger["authenticationRef"] == {"name": self._authentication["metadata"]["name"]}
        host, _, port = trigger["metadata"]["scalerAddress"].partition(":")
        options = [("grpc.ssl_target_name_override", host)]
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", await self._credentials(), options) as channel:
            stub = rpc.ExternalScalerStub(channel)
            (metric,) = (await stub.GetMetricSpec(pool)).metric_specs
            request = pb.GetMetricsRequest(scaled_object_ref=pool, metric_name=metric.metric_name)
            (value,) = (await stub.GetMetrics(request)).metric_values
            is_active = (await stub.IsActive(pool)).result
        wanted = math.ceil(value.metric_value_float / metric.target_size_float) if is_active else 0
        wanted = min(max(wanted, spec["minReplicaCount"]), spec["maxReplicaCount"])
        if name in self._objects.scaled:  # it may have been deleted meanwhile, which ends KEDA's work
            scale = [{"op": "replace", "path": "/spec/replicas", "value": wanted}]
            await self._apps.patch_namespaced_deployment_scale(spec["scaleTargetRef"]["name"], NAMESPACE, scale)

    async def _credentials(self) -> grpc.ChannelCredentials:
        values = {}
        for source in self._authentication["spec"]["secretTargetRef"]:
            secret = await self._core.read_namespaced_secret(source["name"], NAMESPACE)
            values[source["parameter"]] = base64.b64decode(secret.data[source["key"]])
        return grpc.ssl_channel_credentials(values["caCert"], values["tlsClientKey"], values["tlsClientCert"])


@pytest.fixture
async def keda(
    nodes: ControlPlane, peers: Peers, tokens: Tokens, tmp_path: Path
) -> AsyncIterator[tuple[Any, Any, str]]:
    """KEDA's objects, a client for them, and the address of the scaler; KEDA works, with the component's Secret."""
    secrets = make_secrets(Home(tmp_path / "home"), "{service}{password}", "", "")
    certificates = tmp_path / "scaler"
    certificates.mkdir()
    for name, content in secrets["scaler"].items():
        (certificates / name).write_bytes(content)
    port = free_port()
    settings = InferenceSettings.model_construct(keda_listen=f"127.0.0.1:{port}", keda_certificates=certificates)
    servicer = ScalerServicer(QueueAsPools(peers), Notifications(), asyncio.Event())  # type: ignore[arg-type]
    objects = KedaObjects()
    async with (
        await nodes.client() as api,
        keda_door(settings, tokens.verifier(), servicer),
        objects.serving() as custom,
    ):
        data = {name: base64.b64encode(content).decode() for name, content in secrets["keda"].items()}
        secret = {"metadata": {"name": "esd-keda"}, "data": data}
        await client.CoreV1Api(api).create_namespaced_secret(NAMESPACE, secret)
        working = asyncio.create_task(StandInKeda(api, objects).run())
        yield objects, custom, f"inference.esd:{port}"
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


async def test_keda_scales_a_pool_and_the_own_loop_leaves_it_alone(
    keda: tuple[KedaObjects, Any, str], make_kubernetes: Any, store: EndpointStore, task_store: TaskStore,
    database: Any, domain: Endpoints, clients: Any, peers: Peers,
) -> None:  # fmt: skip
    objects, custom, address = keda
    wake = asyncio.Event()
    cluster = await make_kubernetes(on_change=wake.set, has_keda=True, keda_scaler_address=address)
    cluster._api.custom = custom
    at_once = ScalingPolicy(out_seconds=0, in_seconds=0)
    tasks = TaskControl(task_store, clients[0], cluster, wake)
    control = ControlLoop(store, database, *clients, cluster, tasks, wake, at_once, scaled_by_cluster=True)
    running = asyncio.create_task(control.run())
    new = NewEndpoint("keda", "Async", "one-gpu", 1, True, 0, 3, ["painter"])
    endpoint = await domain.create_endpoint(new, "ann")

    async def rests_at(num_workers: int, status: str = "InService") -> bool:
        row = await store.get_live(endpoint.id)
        return (row.status, row.num_live, row.num_workers) == (status, num_workers, num_workers)

    await until(lambda: rests_at(0), seconds=120)
    await peers.queue.set_jobs(endpoint.id, num_queued=5)
    await until(lambda: rests_at(2), seconds=120)
    assert list(objects.scaled) == [name_of(endpoint.id)]
    await domain.update_endpoint(endpoint.id, Change(drain=True), ANN)
    await until(lambda: drained(store, endpoint), seconds=120)
    assert objects.scaled == {}
    await domain.update_endpoint(endpoint.id, Change(drain=False, num_min=1), ANN)
    await until(lambda: rests_at(2), seconds=120)
    await peers.queue.set_jobs(endpoint.id)
    await until(lambda: rests_at(1), seconds=120)
    messages = [event.message for event in await EventStore(database).page_events(endpoint.id, 100, None)]
    assert "from 0 to 2 workers: the cluster decided so" in messages
    await store.mark_deleting([endpoint.name])

    async def nothing_is_left() -> bool:
        return not await store.get_all() and not objects.scaled

    await until(nothing_is_left, seconds=120)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def drained(store: EndpointStore, endpoint: Endpoint) -> bool:
    row = await store.get_live(endpoint.id)
    return (row.status, row.num_live) == ("Draining", 0)


async def test_the_component_lets_the_service_account_write_scaled_objects_and_no_more(nodes: ControlPlane) -> None:
    role, binding = yaml.safe_load_all((COMPONENT / "role.yaml").read_text())
    async with await nodes.client() as api, await nodes.client(await account_token(nodes)) as own:
        reviews: Any = client.AuthorizationV1Api(own)

        async def may(resource: str, verb: str) -> bool:
            wish = {"namespace": NAMESPACE, "group": "keda.sh", "resource": resource, "verb": verb}
            review = {"spec": {"resourceAttributes": wish}}
            return bool((await reviews.create_self_subject_access_review(review)).status.allowed)

        assert not await may("scaledobjects", "patch")
        rbac = client.RbacAuthorizationV1Api(api)
        await rbac.create_namespaced_role(NAMESPACE, role)
        await rbac.create_namespaced_role_binding(NAMESPACE, binding)
        await until(lambda: may("scaledobjects", "patch"))
        assert await may("scaledobjects", "create")
        assert await may("scaledobjects", "delete")
        assert not await may("triggerauthentications", "get")
