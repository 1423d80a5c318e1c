"""Endpoints on Kubernetes through REST: our worker in pods, with jobs that make pictures while things go wrong.

The one-machine stack with ESD_CLUSTER=kubernetes, on a real control plane. Needs KUBEBUILDER_ASSETS: `make test-k8s`.
"""

from __future__ import annotations

import asyncio
import io
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from kubernetes_asyncio import client
from PIL import Image

from deploy.local.ports import free_port
from deploy.local.stack import Stack
from services.endpoints.cluster.pods import OWNER
from tests.deploy.control_plane import ASSETS, ControlPlane, account_token, control_plane, prepare
from tests.deploy.process_kubelet import ProcessKubelet
from tests.e2e.conftest import Api, create_job, finished, new_user, upload, wait_for
from tests.e2e.school import open_school

pytestmark = [pytest.mark.k8s, pytest.mark.timeout(600)]

NAMESPACE = "esd-workers"
PATIENCE = 240  # seconds, on a busy machine
AWAY_SECONDS = 20


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
            self.nodes[name] = ProcessKubelet(self.api, name, 2, self._folder)
            await self._stack.enter_async_context(self.nodes[name])
        self.kubeconfig = self.plane.kubeconfig(await account_token(self.plane))

    def stop(self) -> None:
        """Stops everything."""
        self.do(self._stack.aclose())
        self.do(self._loop.shutdown_asyncgens())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def pods(self, endpoint_id: str) -> list[Any]:
        """The endpoint's pods that are not on their way out."""
        core: Any = client.CoreV1Api(self.api)
        found = self.do(core.list_namespaced_pod(NAMESPACE, label_selector=f"{OWNER}={endpoint_id}")).items
        return [pod for pod in found if not pod.metadata.deletion_timestamp]

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


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if not ASSETS:
        pytest.skip("needs a Kubernetes control plane: set KUBEBUILDER_ASSETS (make test-k8s)")
    site = Site(tmp_path_factory.mktemp("site"))
    site.start()
    yield site
    site.stop()


@pytest.fixture(scope="module")
def painter(site: Site, checkpoint: Path) -> Iterator[Api]:
    """A user of a stack whose workers are pods, with a model."""
    address = f"127.0.0.1:{free_port()}"
    settings = {
        "ESD_CLUSTER": "kubernetes",
        "ESD_KUBERNETES_KUBECONFIG": str(site.kubeconfig),
        "ESD_KUBERNETES_IMAGE": "worker:1",
        "ESD_KUBERNETES_SERVER_URL": f"http://{address}",
        "ESD_KUBERNETES_COMMAND": json.dumps([sys.executable, "-m", "gpu_worker"]),
        "ESD_KUBERNETES_PROFILES": json.dumps({"cpu": {"gpus": 0, "cpu": "100m", "memory": "64Mi"}}),
        "ESD_KUBERNETES_CACHE_GIB": "1",
        "ESD_KUBERNETES_LOST_NODE_SECONDS": "2",
        "ESD_SCALE_OUT_SECONDS": "1",
        "ESD_SCALE_IN_SECONDS": "3",
        "ESD_DRAIN_SECONDS": "10",
    }
    with tempfile.TemporaryDirectory(prefix="esd-k8s-") as folder:
        Path(folder).chmod(0o711)  # PostgreSQL's user must get through, when root runs this
        with Stack(Path(folder) / "home", address, env_overrides=settings) as stack:
            admin = Api(stack.url, stack.api_key)
            api = new_user(admin, "painter", ["checkpoint:all", "sagemaker_endpoint:all", "inference:all", "train:all"])
            assert upload(api, checkpoint).status == 200
            yield api
            api.close()
            admin.close()


@dataclass(frozen=True)
class Pool:
    """An endpoint, seen by its user and by the cluster."""

    api: Api
    site: Site
    id: str
    name: str

    def shows(self, **values: Any) -> bool:
        """Whether REST shows the endpoint so."""
        (found,) = self.api.ok("GET", f"/endpoints?endpointDeploymentJobId={self.id}")["endpoints"]
        assert found["endpoint_status"] != "Failed", found["error"]
        return {name: found[name] for name in values} == values

    def update(self, **values: Any) -> None:
        """Changes it."""
        self.api.ok("PUT", f"/endpoints/{self.id}", values)

    def has_workers(self, num_workers: int) -> None:
        """Waits until so many workers, and no more, are at work."""
        count = str(num_workers)
        wait_for(lambda: self.shows(endpoint_status="InService", current_instance_count=count), PATIENCE)
        wait_for(lambda: len(self.site.pods(self.id)) == num_workers, PATIENCE)

    def draws(self, num_pictures: int = 1) -> None:
        """Has pictures made, and looks at them."""
        jobs = [create_job(self.api, "tiny.safetensors") for _ in range(num_pictures)]
        for job in jobs:
            self.api.ok("PUT", f"/inferences/{job}/start", status=202)
        for job in jobs:
            ended = finished(self.api, job, PATIENCE)
            assert ended["status"] == "succeed", ended
            with Image.open(io.BytesIO(self.api.get(ended["img_presigned_urls"][0]))) as picture:
                assert picture.size == (64, 64)


@pytest.fixture(scope="module")
def pool(painter: Api, site: Site) -> Iterator[Pool]:
    """An endpoint with one worker; afterwards it is deleted, and nothing is left of it."""
    body = {
        "endpoint_name": "pods",
        "endpoint_type": "Async",
        "instance_type": "cpu",
        "initial_instance_count": 1,
        "autoscaling_enabled": False,
        "assign_to_roles": ["painter"],
    }
    made = painter.ok("POST", "/endpoints", body)
    pool = Pool(painter, site, made["EndpointDeploymentJobId"], made["endpoint_name"])
    pool.has_workers(1)
    yield pool
    painter.call("DELETE", "/endpoints", {"endpoint_name_list": [pool.name]})
    wait_for(lambda: site.objects() == [], PATIENCE)


def test_a_worker_in_a_pod_makes_a_picture(pool: Pool) -> None:
    pool.draws()


def test_a_training_is_a_job_of_the_cluster_whose_lora_is_kept(pool: Pool, site: Site) -> None:
    school = open_school(pool.api, "tiny.safetensors")
    training_id = school.begin(output_name="zog", sample_every_n_epochs=0)
    wait_for(lambda: f"Job esd-{training_id}" in site.objects(), PATIENCE)
    ended = school.until(training_id)
    assert ended["job_status"] == "Completed", ended
    row = school.checkpoint(training_id)
    assert row is not None
    assert (row["status"], row["name"]) == ("Active", ["zog.safetensors", "zog-000001.safetensors"])
    wait_for(lambda: not [name for name in site.objects() if training_id in name], PATIENCE)


def test_a_pool_grows_under_load_and_shrinks_to_nothing_when_it_is_idle(pool: Pool) -> None:
    pool.update(autoscaling_enabled=True, min_instance_number=0, max_instance_number=2)
    pool.has_workers(0)
    pool.draws(6)
    listed = pool.api.ok("GET", f"/endpoints/{pool.id}/events?limit=0")["events"]
    messages = [event["message"] for event in listed if event["type"] in {"ScaledOut", "ScaledIn"}]
    assert any(" to 2 workers: " in message for message in messages), messages
    pool.has_workers(0)
    pool.update(autoscaling_enabled=True, min_instance_number=1, max_instance_number=1)
    pool.has_workers(1)


def test_a_worker_whose_node_dies_is_replaced_on_another_and_its_job_is_not_lost(pool: Pool, site: Site) -> None:
    (pod,) = site.pods(pool.id)
    site.do(site.nodes[pod.spec.node_name].die())
    pool.draws()
    (replacement,) = site.pods(pool.id)
    assert replacement.spec.node_name in site.nodes.keys() - {pod.spec.node_name}
    # As its cloud does, so that the pods that were there go too.
    site.do(client.CoreV1Api(site.api).delete_node(pod.spec.node_name))


def test_jobs_go_on_while_the_api_server_is_away_and_the_pool_follows_it_when_it_is_back(
    pool: Pool, site: Site
) -> None:
    def meanwhile() -> None:
        began = time.monotonic()
        pool.draws()
        pool.update(autoscaling_enabled=True, min_instance_number=2, max_instance_number=2)
        time.sleep(max(0.0, began + AWAY_SECONDS - time.monotonic()))  # so long it is away

    site.without_api(meanwhile)
    pool.has_workers(2)
    pool.draws()
