"""Owns tasks that are Jobs: the cluster begins them when a GPU of their profile is free, and again after a failure.

Who goes first is told by the pods' priority classes, so it is the scheduler that lets tasks wait, and that asks workers
to leave where tasks go first. How many attempts have failed is told by a task's Job, and then by its row, which is all
there is to know it by when a Job is gone.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from kubernetes_asyncio.client.exceptions import ApiException

from services.common.process import EXIT_INTERRUPTED
from services.endpoints.cluster import TaskStatus, manifests
from services.endpoints.cluster.informer import Informer
from services.endpoints.cluster.kubernetes_api import (
    INVALID,
    TIMEOUT_SECONDS,
    KubernetesApi,
    UnknownProfileError,
    exists,
    ignoring,
    is_lost,
    obstacle_of,
    sentence,
    told_as_unavailable,
)
from services.endpoints.cluster.pods import name_of
from services.endpoints.cluster.tail import how_it_ended, last_words_in
from services.endpoints.rows import Task, TaskState

_NO_MEMORY = "OOMKilled"  # a container's reason, by its runtime


class KubernetesTasks:
    """Runs tasks as Jobs."""

    def __init__(self, api: KubernetesApi, jobs: Informer, pods: Informer) -> None:
        self._api = api
        self._jobs = jobs
        self._pods = pods

    async def apply(self, task: Task, should_run: bool) -> TaskStatus:
        """Makes the Job or deletes it, and reads from it and its pods what became of the task."""
        with told_as_unavailable():
            jobs, pods = await self._jobs.of(task.id), await self._pods.of(task.id)
            if not should_run:
                if jobs:
                    await self._delete(task.id)
                is_running = any(exists(pod) for pod in pods)
                return TaskStatus.of(task, TaskState.RUNNING if is_running else TaskState.WAITING, task.reason)
            if not jobs:
                return await self._create(task)
            status = _status(task, jobs[0], pods)
            if status.state != TaskState.WAITING or not _is_left_with_lost(jobs[0], pods):
                return status
            if status.num_failed > task.num_failed:
                return status  # the row has to know it before the Job is gone
            await self._delete(task.id)
            return await self._create(task)

    async def _delete(self, task_id: str) -> None:
        with ignoring(HTTPStatus.NOT_FOUND):
            await self._api.batch.delete_namespaced_job(
                name_of(task_id),
                self._api.namespace,
                propagation_policy="Background",
                _request_timeout=TIMEOUT_SECONDS,
            )

    async def _create(self, task: Task) -> TaskStatus:
        """Makes the Job, once: what runs for hours is not changed by a newer version of this service."""
        try:
            manifest = manifests.job(task, self._api.profile(task.instance_type), self._api.program(task.kind))
            with ignoring(HTTPStatus.CONFLICT):
                made = await self._api.batch.create_namespaced_job(
                    self._api.namespace, manifest, _request_timeout=TIMEOUT_SECONDS
                )
                self._jobs.put(made)
        except ApiException as error:
            if error.status not in INVALID:
                raise
            return TaskStatus.of(task, TaskState.FAILED, f"the cluster refuses this task: {sentence(error)}")
        except UnknownProfileError as error:
            return TaskStatus.of(task, TaskState.FAILED, str(error))
        return TaskStatus.of(task, TaskState.WAITING, task.reason)


def _status(task: Task, job: Any, pods: list[Any]) -> TaskStatus:
    """What became of the task. Its pods know first; the Job remembers those that are gone."""
    pods = [pod for pod in pods if not is_lost(pod)]
    # The times are whole seconds; of two in one, the one that changed last.
    pods.sort(key=lambda pod: (pod.metadata.creation_timestamp, int(pod.metadata.resource_version)))
    pods = [pod for pod in pods if not _is_interrupted(pod)]
    phases = [pod.status.phase for pod in pods]
    conditions = {found.type for found in job.status.conditions or () if found.status == "True"}
    num_failed = max(_num_failed(job), phases.count("Failed"), task.num_failed)
    if "Succeeded" in phases or "Complete" in conditions:
        return TaskStatus(TaskState.SUCCEEDED, max(num_failed + 1, task.num_attempts), num_failed)
    if num_failed >= task.max_attempts or "Failed" in conditions:
        return TaskStatus(TaskState.FAILED, max(num_failed, task.num_attempts), num_failed, _last_failure(pods))
    if "Running" in phases:
        return TaskStatus(TaskState.RUNNING, max(num_failed + 1, task.num_attempts), num_failed)
    reason = obstacle_of(pods[-1]) if pods else ""
    if not reason and num_failed:
        reason = f"attempt {num_failed} of {task.max_attempts} failed: {_last_failure(pods)}"
    return TaskStatus(TaskState.WAITING, max(num_failed, task.num_attempts), num_failed, reason or task.reason)


def _num_failed(job: Any) -> int:
    """How many attempts the Job remembers as failed, with those of Jobs that it stands in for."""
    return (job.status.failed or 0) + int((job.metadata.annotations or {}).get(manifests.FAILED_BEFORE, 0))


def _is_left_with_lost(job: Any, pods: list[Any]) -> bool:
    """Whether all that may run of the Job is on a node that was lost.

    A Job with a podFailurePolicy waits until such a pod has Failed (Kubernetes 1.28 and newer), which nobody says until
    the Node is removed. Another Job does not wait for it, and should it come back it finds itself superseded.
    """
    own = [pod for pod in pods if job.metadata.uid in {owner.uid for owner in pod.metadata.owner_references or ()}]
    running = [pod for pod in own if pod.status.phase not in {"Succeeded", "Failed"}]
    return bool(running) and all(is_lost(pod) for pod in running)


def _is_interrupted(pod: Any) -> bool:
    """Whether the pod was sent away, which the Job's podFailurePolicy does not count."""
    if pod.status.phase != "Failed":
        return False
    ends = [container.state.terminated for container in pod.status.container_statuses or ()]
    return any(end and end.exit_code == EXIT_INTERRUPTED for end in ends) or any(
        (found.type, found.status) == (manifests.DISRUPTED, "True") for found in pod.status.conditions or ()
    )


def _last_failure(pods: list[Any]) -> str:
    """Why the last attempt failed, as far as its pod still tells."""
    for pod in reversed(pods):
        for container in pod.status.container_statuses or ():
            if (end := container.state.terminated) and end.exit_code:
                if end.reason == _NO_MEMORY:
                    return "it was ended since it needs more memory than its instance type has"
                return f"it {how_it_ended(end.exit_code)}: {last_words_in(end.message)}"
        if pod.status.phase == "Failed":
            return f"it was ended by the cluster: {pod.status.message or pod.status.reason or 'nobody says why'}"
    return "its pod is gone"
