"""What a pool looks like on Kubernetes, without one: valid, hardened, and with the resources of its profile."""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubernetes_asyncio import client

from services.endpoints.cluster import Pool, kubernetes_tasks, manifests
from services.endpoints.cluster.kubernetes_api import (
    KubernetesApi,
    KubernetesSettings,
    UnknownProfileError,
    obstacle_of,
)
from services.endpoints.cluster.pods import Program, secret_object
from services.endpoints.cluster.profiles import AWS_PROFILES, Profile
from services.endpoints.rows import Task
from tests.processes import ROOT

PROGRAM = Program("esd-gpu-worker:0.1.0", ["python"], "https://gateway", 100, 60, 30, "esd-before-others")
POOL = Pool("11111111-2222-3333-4444-555555555555", "a name", "ml.g5.12xlarge")
TASK = Task(
    id="66666666-7777-8888-9999-000000000000",
    kind="train",
    service="training",
    instance_type="any",
    max_attempts=3,
    deadline_seconds=3600,
    creation_time=datetime.now(UTC),
)
PRIORITIES = ROOT / "deploy" / "kubernetes" / "workers" / "priorities.yaml"


def deployment(profile: Profile) -> dict[str, Any]:
    return manifests.deployment(POOL, profile, PROGRAM)


def container_of(found: dict[str, Any]) -> dict[str, Any]:
    container: dict[str, Any] = found["spec"]["template"]["spec"]["containers"][0]
    return container


def test_the_objects_of_a_pool_are_valid_for_the_three_newest_versions() -> None:
    own = Profile(gpus=0, runtime_class="nvidia", tolerations=[])
    objects = [
        deployment(AWS_PROFILES["ml.g4dn.xlarge"]),
        deployment(own),
        manifests.job(TASK, own, PROGRAM),
        secret_object(POOL.endpoint_id, "secret"),
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
    assert pod["shareProcessNamespace"] is True
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
    tolerated = [toleration["key"] for toleration in found["spec"]["template"]["spec"]["tolerations"]]
    assert tolerated == ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"]
    assert {"name": "ESD_DEVICE", "value": "cpu"} in container_of(found)["env"]


@pytest.fixture
async def idle_client() -> AsyncIterator[client.ApiClient]:
    """A client that calls nobody."""
    async with client.ApiClient() as api:
        yield api


def test_profiles_of_the_settings_come_beside_those_of_aws_and_before_them(
    monkeypatch: pytest.MonkeyPatch, idle_client: client.ApiClient
) -> None:
    monkeypatch.setenv("ESD_KUBERNETES_IMAGE", "image:1")
    monkeypatch.setenv("ESD_KUBERNETES_SERVER_URL", "http://gateway:8080")
    monkeypatch.setenv("ESD_KUBERNETES_PROFILES", '{"mine": {"gpus": 2}, "ml.g5.xlarge": {"memory": "1Gi"}}')
    api = KubernetesApi(idle_client, KubernetesSettings(), 60, "pools")
    assert api.profile("mine").gpus == 2
    assert api.profile("ml.g5.xlarge").memory == "1Gi"
    assert api.profile("ml.g6.xlarge") == AWS_PROFILES["ml.g6.xlarge"]
    with pytest.raises(UnknownProfileError, match=r"it has mine, ml\.g4dn"):
        api.profile("ml.p2.xlarge")


def test_settings_of_workers_are_handed_on_to_pods(
    monkeypatch: pytest.MonkeyPatch, idle_client: client.ApiClient
) -> None:
    monkeypatch.setenv("ESD_COMPILE", "true")
    monkeypatch.setenv("ESD_FP8", "")  # which is not set
    monkeypatch.setenv("ESD_DATABASE_URL", "of the service alone")
    api = KubernetesApi(idle_client, KubernetesSettings(image="image:1", server_url="http://gateway:8080"), 60, "pools")
    container = container_of(manifests.deployment(POOL, Profile(), api.program()))
    assert {"name": "ESD_COMPILE", "value": "true"} in container["env"]
    assert {"ESD_FP8", "ESD_DATABASE_URL"}.isdisjoint(variable["name"] for variable in container["env"])


def test_whoever_goes_first_has_the_higher_priority_and_only_tasks_take_the_place_of_others(
    idle_client: client.ApiClient,
) -> None:
    settings = KubernetesSettings(image="image:1", server_url="http://gateway:8080")
    pools_first = KubernetesApi(idle_client, settings, 60, "pools")
    tasks_first = KubernetesApi(idle_client, settings, 60, "tasks")
    classes = {found["metadata"]["name"]: found for found in yaml.safe_load_all(PRIORITIES.read_text())}

    def class_of(program: Program) -> Any:
        return classes[program.priority_class]

    assert class_of(pools_first.program())["value"] > class_of(pools_first.program("train"))["value"]
    assert class_of(tasks_first.program())["value"] < class_of(tasks_first.program("train"))["value"]
    never = [
        class_of(api.program(kind)) for api, kind in ((pools_first, None), (pools_first, "train"), (tasks_first, None))
    ]
    assert {found["preemptionPolicy"] for found in never} == {"Never"}
    assert class_of(tasks_first.program("train"))["preemptionPolicy"] == "PreemptLowerPriority"
    assert tasks_first.program("train").command == ["python", "-m", "gpu_worker", "train"]


def test_a_task_is_begun_as_often_as_it_may_and_looks_like_a_worker_otherwise() -> None:
    found = manifests.job(TASK, Profile(), PROGRAM)
    worker, task = (of["spec"]["template"]["spec"] for of in (deployment(Profile()), found))
    assert found["spec"]["backoffLimit"] == 2
    almost_given_up = TASK.model_copy(update={"num_failed": 2})
    assert manifests.job(almost_given_up, Profile(), PROGRAM)["spec"]["backoffLimit"] == 0
    assert {rule["action"] for rule in found["spec"]["podFailurePolicy"]["rules"]} == {"Ignore"}
    assert task["activeDeadlineSeconds"] == 3600
    assert {name for name in task if task[name] != worker.get(name)} == {
        "restartPolicy", "activeDeadlineSeconds", "containers", "volumes",
    }  # fmt: skip
    assert {"name": "ESD_TASK_ID", "value": TASK.id} in container_of(found)["env"]
    assert container_of(found)["securityContext"] == container_of(deployment(Profile()))["securityContext"]


def failed_pod(number: int, exit_code: int, *conditions: str, reason: str = "Error") -> client.V1Pod:
    """A pod of a task that has ended so."""
    ending = client.V1ContainerStateTerminated(exit_code=exit_code, reason=reason, message="no more")
    end = client.V1ContainerState(terminated=ending)
    ended = client.V1ContainerStatus(name="w", image="i", image_id="i", ready=False, restart_count=0, state=end)
    conditions_of = [client.V1PodCondition(type=kind, status="True") for kind in conditions]
    return client.V1Pod(
        metadata=client.V1ObjectMeta(creation_timestamp=datetime.now(UTC), resource_version=str(number)),
        status=client.V1PodStatus(phase="Failed", container_statuses=[ended], conditions=conditions_of),
    )


@pytest.mark.parametrize(
    ("phase", "placed", "waiting", "obstacle"),
    [
        ("Pending", "False", None, "it waits for a place: 0/3 nodes are available"),
        ("Pending", "True", ("ImagePullBackOff", 'Back-off pulling image "w"'), 'it waits: Back-off pulling image "w"'),
        ("Pending", "True", ("ContainerCreating", None), ""),
        ("Running", "True", ("CrashLoopBackOff", "back-off 10s restarting failed container"), ""),
    ],
)
def test_a_pod_that_does_not_run_yet_says_what_it_waits_for(
    phase: str, placed: str, waiting: tuple[str, str | None] | None, obstacle: str
) -> None:
    scheduled = client.V1PodCondition(type="PodScheduled", status=placed, message="0/3 nodes are available")
    container = client.V1ContainerStatus(name="w", image="w", image_id="", ready=False, restart_count=0)
    if waiting is not None:
        reason, message = waiting
        container.state = client.V1ContainerState(waiting=client.V1ContainerStateWaiting(message, reason))
    containers = [container] if waiting else []
    status = client.V1PodStatus(phase=phase, conditions=[scheduled], container_statuses=containers)
    assert obstacle_of(client.V1Pod(status=status)) == obstacle


def test_pods_that_were_sent_away_are_no_failed_attempts() -> None:
    job = client.V1Job(metadata=client.V1ObjectMeta(), status=client.V1JobStatus(failed=1))
    pods = [failed_pod(1, 5), failed_pod(2, 137, "DisruptionTarget"), failed_pod(3, 1)]
    state = kubernetes_tasks._status(TASK, job, pods)
    assert (state.state, state.reason) == ("waiting", "attempt 1 of 3 failed: it ended with code 1: no more")
    others = [failed_pod(4, 1), failed_pod(5, 1)]
    assert kubernetes_tasks._status(TASK, job, [*pods, *others]).state == "failed"


@pytest.mark.parametrize(
    ("pod", "reason"),
    [
        (failed_pod(1, 3), "it ended with code 3: no more"),
        (failed_pod(1, 137), "it was ended by signal 9: no more"),
        (failed_pod(1, 137, reason="OOMKilled"), "it was ended since it needs more memory than its instance type has"),
    ],
)
def test_a_failed_task_says_how_its_last_pod_ended(pod: client.V1Pod, reason: str) -> None:
    job = client.V1Job(metadata=client.V1ObjectMeta(), status=client.V1JobStatus(failed=TASK.max_attempts))
    assert kubernetes_tasks._status(TASK, job, [pod]).reason == reason
