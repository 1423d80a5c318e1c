"""Endpoints on Kubernetes through REST: our worker in pods, with jobs that make pictures while things go wrong.

Needs KUBEBUILDER_ASSETS: `make test-k8s`.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from kubernetes_asyncio import client
from PIL import Image

from tests.e2e.conftest import Api, create_job, finished, wait_for
from tests.e2e.kubernetes.site import PATIENCE, Site

pytestmark = [pytest.mark.k8s, pytest.mark.timeout(600)]

AWAY_SECONDS = 20


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
    site.do(site.add_node(f"{pod.spec.node_name}-again"))


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
