"""Owns how pools and tasks look as Kubernetes objects: a Deployment and its PodDisruptionBudget, a Job."""

from __future__ import annotations

from typing import Any

from services.endpoints.cluster import Pool
from services.endpoints.cluster.pods import OWNER, Program, labels_of, name_of, pod_template
from services.endpoints.cluster.profiles import Profile
from services.endpoints.task_store import Task


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


def job(task: Task, profile: Profile, program: Program) -> dict[str, Any]:
    """The task's Job: its pod runs once for each attempt.

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
            "annotations": {"esd/task-kind": task.kind, "esd/instance-type": task.instance_type},
        },
        "spec": {
            "backoffLimit": task.max_attempts - 1,
            "template": pod_template(task.id, profile, program, [task_id], restartPolicy="Never", **deadline),
        },
    }
