"""Owns how pools and tasks look as Kubernetes objects: a Deployment, its budget and ScaledObject, a Job."""

from __future__ import annotations

import math
from typing import Any

from services.common.process import EXIT_INTERRUPTED
from services.endpoints.cluster import Autoscaling, Pool
from services.endpoints.cluster.pods import OWNER, Program, labels_of, name_of, pod_template
from services.endpoints.cluster.profiles import Profile
from services.endpoints.rows import Task

FAILED_BEFORE = "esd/failed-before"  # the annotation of a Job that stands in for another one
DISRUPTED = "DisruptionTarget"  # the condition of a pod that was evicted, preempted or on a node that went
KEDA_GROUP, KEDA_VERSION, SCALED_OBJECTS = "keda.sh", "v1alpha1", "scaledobjects"
_KEDA_AUTHENTICATION = "esd-keda"  # deploy/kubernetes/components/keda
_LONGEST_WINDOW_SECONDS = 3600  # autoscaling/v2


def deployment(pool: Pool, profile: Profile, program: Program) -> dict[str, Any]:
    """The pool's Deployment, without `replicas`: those are of the scale subresource alone."""
    worker_id = {"name": "ESD_WORKER_ID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {
            "name": name_of(pool.endpoint_id),
            "labels": labels_of(pool.endpoint_id),
            "annotations": {"esd/endpoint-name": pool.endpoint_name, "esd/instance-type": pool.instance_type},
        },
        "spec": {
            "selector": {"matchLabels": {OWNER: pool.endpoint_id}},
            # A new version takes the GPU of an old one, since there may be no other.
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
            "template": pod_template(pool.endpoint_id, profile, program, [worker_id]),
        },
    }


def disruption_budget(endpoint_id: str) -> dict[str, Any]:
    """A node's drain takes one worker of a pool at a time."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": name_of(endpoint_id), "labels": labels_of(endpoint_id)},
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": {OWNER: endpoint_id}}},
    }


def scaled_object(pool: Pool, scaling: Autoscaling, scaler_address: str) -> dict[str, Any]:
    """What KEDA needs to scale the pool's Deployment as the own loop would (services/endpoints/scaling.py)."""
    at_once = [{"type": "Pods", "value": scaling.num_max, "periodSeconds": 15}]

    def after(seconds: float) -> dict[str, Any]:
        return {"stabilizationWindowSeconds": min(math.ceil(seconds), _LONGEST_WINDOW_SECONDS), "policies": at_once}

    metadata = {
        "scalerAddress": scaler_address,
        "endpointId": pool.endpoint_id,
        "target": f"{scaling.target:g}",
        "jobSeconds": f"{scaling.policy.job_seconds:g}",
    }
    behavior = {"scaleUp": after(scaling.policy.out_seconds), "scaleDown": after(scaling.policy.in_seconds)}
    trigger = {"type": "external-push", "metadata": metadata, "authenticationRef": {"name": _KEDA_AUTHENTICATION}}
    return {
        "apiVersion": f"{KEDA_GROUP}/{KEDA_VERSION}",
        "kind": "ScaledObject",
        "metadata": {"name": name_of(pool.endpoint_id), "labels": labels_of(pool.endpoint_id)},
        "spec": {
            "scaleTargetRef": {"name": name_of(pool.endpoint_id)},
            "minReplicaCount": scaling.num_min,
            "maxReplicaCount": scaling.num_max,
            "pollingInterval": 5,
            "cooldownPeriod": math.ceil(scaling.policy.in_seconds),
            "initialCooldownPeriod": math.ceil(scaling.policy.in_seconds),
            "advanced": {"horizontalPodAutoscalerConfig": {"behavior": behavior}},
            "triggers": [trigger],
        },
    }


def job(task: Task, profile: Profile, program: Program) -> dict[str, Any]:
    """The task's Job: its pod runs once for each attempt that is left. Those that failed were an earlier Job's.

    The deadline is the control loop's affair, since it counts from the first beginning and over all attempts. The
    pod's own is for the time when no control loop runs.
    """
    deadline = {} if task.deadline_seconds is None else {"activeDeadlineSeconds": task.deadline_seconds}
    task_id = {"name": "ESD_TASK_ID", "value": task.id}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": name_of(task.id),
            "labels": labels_of(task.id),
            "annotations": {
                "esd/task-kind": task.kind,
                "esd/instance-type": task.instance_type,
                FAILED_BEFORE: str(task.num_failed),
            },
        },
        "spec": {
            "backoffLimit": task.max_attempts - task.num_failed - 1,
            # Whom the cluster sends away has not failed.
            "podFailurePolicy": {
                "rules": [
                    {"action": "Ignore", "onPodConditions": [{"type": DISRUPTED, "status": "True"}]},
                    {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [EXIT_INTERRUPTED]}},
                ]
            },
            "template": pod_template(task.id, profile, program, [task_id], restartPolicy="Never", **deadline),
        },
    }
