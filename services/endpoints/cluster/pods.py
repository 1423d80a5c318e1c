"""Owns how a pod of ours looks, whether it is a pool's worker or a task: hardened, on a node of its profile.

All objects have their owner's id as a label, the endpoint's or the task's, so that they are found without its row.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass, field
from typing import Any

from services.endpoints.cluster.profiles import Profile

MANAGER = "esd-endpoints"
MANAGED = f"app.kubernetes.io/managed-by={MANAGER}"
OWNER = "esd/owner"  # the label with the owner's id
_SECRETS, _CACHE = "/run/secrets/esd", "/cache"
_USER = 10001
_LEAVE_SECONDS = 10  # to leave after the drain
GIB = 2**30


@dataclass(frozen=True)
class Program:
    """What runs in a pod. `priority_class` is one of deploy/kubernetes/workers/priorities.yaml, `settings` are added to
    what it gets."""

    image: str
    command: list[str]
    server_url: str
    cache_gib: int
    drain_seconds: float
    lost_node_seconds: int
    priority_class: str
    settings: dict[str, str] = field(default_factory=dict)


def name_of(owner_id: str) -> str:
    """The name of all objects of an owner."""
    return f"esd-{owner_id}"


def labels_of(owner_id: str) -> dict[str, str]:
    """The labels of all objects of an owner."""
    own = {"app.kubernetes.io/name": "gpu-worker", "app.kubernetes.io/part-of": "esd"}
    return {**own, "app.kubernetes.io/managed-by": MANAGER, OWNER: owner_id}


def secret_object(owner_id: str, value: str) -> dict[str, Any]:
    """The Secret that the owner's pods read as a file."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name_of(owner_id), "labels": labels_of(owner_id)},
        "type": "Opaque",
        "data": {"secret": base64.b64encode(value.encode()).decode()},
    }


def pod_template(
    owner_id: str, profile: Profile, program: Program, environment: list[dict[str, Any]], **spec: Any
) -> dict[str, Any]:
    """The template of the owner's pods; `spec` is added to theirs."""
    return {
        "metadata": {"labels": labels_of(owner_id)},
        "spec": {
            **_place(profile, program.lost_node_seconds),
            **spec,
            "priorityClassName": program.priority_class,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            # Else the worker is the first process of its container, to which SIGTERM does nothing while it starts.
            "shareProcessNamespace": True,
            # SIGTERM is the drain: a worker finishes its jobs and takes no more. A preStop hook could only say the same
            # a moment earlier.
            "terminationGracePeriodSeconds": math.ceil(program.drain_seconds) + _LEAVE_SECONDS,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": _USER,
                "runAsGroup": _USER,
                "fsGroup": _USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [_container(profile, program, environment)],
            "volumes": [
                {"name": "secrets", "secret": {"secretName": name_of(owner_id), "defaultMode": 0o440}},
                # A tenth more than the worker keeps: it makes room before it fetches, except of what its jobs use.
                {"name": "cache", "emptyDir": {"sizeLimit": f"{math.ceil(program.cache_gib * 1.1)}Gi"}},
                {"name": "tmp", "emptyDir": {"sizeLimit": "4Gi"}},
            ],
        },
    }


def _place(profile: Profile, lost_node_seconds: int) -> dict[str, Any]:
    """On which nodes, and for how long on one that is lost: its jobs have gone to others long before."""
    lost = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
    tolerated = [
        {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": lost_node_seconds}
        for key in lost
    ]
    place: dict[str, Any] = {"tolerations": [*(profile.tolerations if profile.gpus else []), *tolerated]}
    if profile.node_selector:
        place["nodeSelector"] = profile.node_selector
    if profile.runtime_class:
        place["runtimeClassName"] = profile.runtime_class
    return place


def _container(profile: Profile, program: Program, environment: list[dict[str, Any]]) -> dict[str, Any]:
    gpus = {"nvidia.com/gpu": str(profile.gpus)} if profile.gpus else {}
    values = program.settings | {
        "ESD_SERVER_URL": program.server_url,
        "ESD_SECRET_FILE": f"{_SECRETS}/secret",
        "ESD_CACHE_DIR": _CACHE,
        "ESD_CACHE_MAX_BYTES": str(program.cache_gib * GIB),
        "ESD_DEVICE": "cuda" if profile.gpus else "cpu",
        "ESD_DRAIN_SECONDS": str(program.drain_seconds),
        "ESD_LOG_FORMAT": "json",
        "HOME": "/tmp",  # noqa: S108 - a volume of the pod's own
    }
    return {
        "name": "worker",
        "image": program.image,
        "command": program.command,
        "env": [*({"name": name, "value": value} for name, value in values.items()), *environment],
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
