"""Owns how a pool looks as Kubernetes objects: a Deployment, the Secret of its workers, a PodDisruptionBudget.

All have the endpoint's id as a label, so that they are found without the row that they were made for.
"""

from __future__ import annotations

import base64
import math
from typing import Any

from services.endpoints.cluster import Pool
from services.endpoints.cluster.profiles import Profile

MANAGER = "esd-endpoints"
MANAGED = f"app.kubernetes.io/managed-by={MANAGER}"
ENDPOINT = "esd/endpoint"  # the label with the endpoint's id
_SECRETS, _CACHE = "/run/secrets/esd", "/cache"
_USER = 10001
_LEAVE_SECONDS = 10  # to leave after the drain
GIB = 2**30


def name_of(endpoint_id: str) -> str:
    """The name of all objects of a pool."""
    return f"esd-{endpoint_id}"


def labels_of(endpoint_id: str) -> dict[str, str]:
    """The labels of all objects of a pool."""
    own = {"app.kubernetes.io/name": "gpu-worker", "app.kubernetes.io/part-of": "esd"}
    return {**own, "app.kubernetes.io/managed-by": MANAGER, ENDPOINT: endpoint_id}


def secret(endpoint_id: str, value: str) -> dict[str, Any]:
    """The Secret that the pool's workers read as a file."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name_of(endpoint_id), "labels": labels_of(endpoint_id)},
        "type": "Opaque",
        "data": {"secret": base64.b64encode(value.encode()).decode()},
    }


def disruption_budget(endpoint_id: str) -> dict[str, Any]:
    """A node's drain takes one worker of a pool at a time."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": name_of(endpoint_id), "labels": labels_of(endpoint_id)},
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": {ENDPOINT: endpoint_id}}},
    }


def deployment(
    pool: Pool, profile: Profile, image: str, command: list[str], server_url: str, cache_gib: int, drain_seconds: float
) -> dict[str, Any]:
    """The pool's Deployment, without `replicas`: those are of the scale subresource alone."""
    labels = labels_of(pool.endpoint_id)
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {
            "name": name_of(pool.endpoint_id),
            "labels": labels,
            "annotations": {"esd/endpoint-name": pool.endpoint_name, "esd/instance-type": pool.instance_type},
        },
        "spec": {
            "selector": {"matchLabels": {ENDPOINT: pool.endpoint_id}},
            # A new version takes the GPU of an old one, since there may be no other.
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    **_place(profile),
                    "automountServiceAccountToken": False,
                    "enableServiceLinks": False,
                    # SIGTERM is the drain: a worker finishes its jobs and takes no more. A preStop hook could only say
                    # the same a moment earlier.
                    "terminationGracePeriodSeconds": math.ceil(drain_seconds) + _LEAVE_SECONDS,
                    "securityContext": {
                        "runAsNonRoot": True,
                        "runAsUser": _USER,
                        "runAsGroup": _USER,
                        "fsGroup": _USER,
                        "seccompProfile": {"type": "RuntimeDefault"},
                    },
                    "containers": [_container(profile, image, command, server_url, cache_gib, drain_seconds)],
                    "volumes": [
                        {"name": "secrets", "secret": {"secretName": name_of(pool.endpoint_id), "defaultMode": 0o440}},
                        # A tenth more than the worker keeps: a model that is being fetched stands beside the others.
                        {"name": "cache", "emptyDir": {"sizeLimit": f"{math.ceil(cache_gib * 1.1)}Gi"}},
                        {"name": "tmp", "emptyDir": {"sizeLimit": "4Gi"}},
                    ],
                },
            },
        },
    }


def _place(profile: Profile) -> dict[str, Any]:
    """On which nodes."""
    place: dict[str, Any] = {"nodeSelector": profile.node_selector} if profile.node_selector else {}
    if profile.gpus and profile.tolerations:
        place["tolerations"] = profile.tolerations
    if profile.runtime_class:
        place["runtimeClassName"] = profile.runtime_class
    return place


def _container(
    profile: Profile, image: str, command: list[str], server_url: str, cache_gib: int, drain_seconds: float
) -> dict[str, Any]:
    gpus = {"nvidia.com/gpu": str(profile.gpus)} if profile.gpus else {}
    values = {
        "ESD_SERVER_URL": server_url,
        "ESD_SECRET_FILE": f"{_SECRETS}/secret",
        "ESD_CACHE_DIR": _CACHE,
        "ESD_CACHE_MAX_BYTES": str(cache_gib * GIB),
        "ESD_DEVICE": "cuda" if profile.gpus else "cpu",
        "ESD_DRAIN_SECONDS": str(drain_seconds),
        "ESD_LOG_FORMAT": "json",
        "HOME": "/tmp",  # noqa: S108 - a volume of the pod's own
    }
    return {
        "name": "worker",
        "image": image,
        "command": command,
        "env": [
            *({"name": name, "value": value} for name, value in values.items()),
            {"name": "ESD_WORKER_ID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        ],
        "resources": {
            "requests": {"cpu": profile.cpu, "memory": profile.memory, **gpus},
            "limits": {"memory": profile.memory, **gpus},
        },
        # What it said last is in the pod's status then, and nobody needs to read logs.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "secrets", "mountPath": _SECRETS, "readOnly": True},
            {"name": "cache", "mountPath": _CACHE},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - the same
        ],
    }
