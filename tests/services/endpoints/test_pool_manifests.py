"""What a pool looks like on Kubernetes, without one: valid, hardened, and with the resources of its profile."""

from __future__ import annotations

import warnings
from typing import Any

import kubernetes_validate
import pytest

from services.endpoints.cluster import Pool, manifests
from services.endpoints.cluster.kubernetes import KubernetesSettings
from services.endpoints.cluster.profiles import AWS_PROFILES, Profile

POOL = Pool("11111111-2222-3333-4444-555555555555", "a name", "ml.g5.12xlarge")


def deployment(profile: Profile) -> dict[str, Any]:
    return manifests.deployment(POOL, profile, "esd-gpu-worker:0.1.0", ["python"], "https://gateway", 100, 60)


def container_of(found: dict[str, Any]) -> dict[str, Any]:
    container: dict[str, Any] = found["spec"]["template"]["spec"]["containers"][0]
    return container


def test_the_objects_of_a_pool_are_valid_for_the_three_newest_versions() -> None:
    own = Profile(gpus=0, runtime_class="nvidia", tolerations=[])
    objects = [
        deployment(AWS_PROFILES["ml.g4dn.xlarge"]),
        deployment(own),
        manifests.secret(POOL.endpoint_id, "secret"),
        manifests.disruption_budget(POOL.endpoint_id),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own use of jsonschema
        for version in kubernetes_validate.utils.all_versions()[-3:]:
            for found in objects:
                kubernetes_validate.validate(found, version, strict=True)


def test_a_worker_has_no_root_no_capabilities_no_token_and_time_to_drain() -> None:
    found = deployment(Profile())
    pod = found["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["terminationGracePeriodSeconds"] == 70
    assert container_of(found)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_number_of_workers_is_left_to_the_scale_subresource() -> None:
    assert "replicas" not in deployment(Profile())["spec"]


def test_a_worker_gets_one_gpu_and_its_share_of_a_node_of_aws() -> None:
    found = deployment(AWS_PROFILES["ml.g5.12xlarge"])
    assert container_of(found)["resources"]["limits"] == {"memory": "36864Mi", "nvidia.com/gpu": "1"}
    assert found["spec"]["template"]["spec"]["nodeSelector"] == {"node.kubernetes.io/instance-type": "g5.12xlarge"}
    assert {name.split(".")[1] for name in AWS_PROFILES} == {"g4dn", "g5", "g6"}


def test_a_worker_without_a_gpu_asks_for_none() -> None:
    found = deployment(Profile(gpus=0))
    assert "nvidia.com/gpu" not in container_of(found)["resources"]["limits"]
    assert "tolerations" not in found["spec"]["template"]["spec"]
    assert {"name": "ESD_DEVICE", "value": "cpu"} in container_of(found)["env"]


def test_profiles_of_the_settings_come_beside_those_of_aws_and_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESD_KUBERNETES_IMAGE", "image:1")
    monkeypatch.setenv("ESD_KUBERNETES_SERVER_URL", "http://gateway:8080")
    monkeypatch.setenv("ESD_KUBERNETES_PROFILES", '{"mine": {"gpus": 2}, "ml.g5.xlarge": {"memory": "1Gi"}}')
    settings = KubernetesSettings()
    assert (mine := settings.profile("mine")) is not None
    assert mine.gpus == 2
    assert (changed := settings.profile("ml.g5.xlarge")) is not None
    assert changed.memory == "1Gi"
    assert settings.profile("ml.g6.xlarge") == AWS_PROFILES["ml.g6.xlarge"]
    assert settings.profile("ml.p2.xlarge") is None
