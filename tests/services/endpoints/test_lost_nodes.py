"""A task whose node is lost goes on in a Job of its own where the first one waits for the node's pod to end.

Jobs do so since Kubernetes 1.28. The API server is in memory, because the control plane that the tests can build for
themselves is older.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

from aiohttp import web

from services.endpoints.cluster.pods import labels_of, name_of
from services.endpoints.rows import Task, TaskState
from tests.services.endpoints.test_budgets import ApiServer

TASK = Task(
    id="11111111-2222-3333-4444-555555555555",
    kind="train",
    service="training",
    instance_type="ml.g5.xlarge",
    max_attempts=3,
    num_attempts=2,
    num_failed=1,
    state=TaskState.RUNNING,
    creation_time=datetime.now(UTC),
)


def found(name: str, **metadata: Any) -> dict[str, Any]:
    return {"name": name, "resourceVersion": "2", "labels": labels_of(TASK.id), **metadata}


class WithJob(ApiServer):
    """Has a Job of which one attempt has failed and one runs, in a pod that should be gone since these seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__([])
        gone_by = datetime.now(UTC) - timedelta(seconds=seconds)
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name_of(TASK.id), "uid": "first"}
        on_its_node = found("a-pod", deletionTimestamp=gone_by.isoformat(), ownerReferences=[owner])
        template = {"spec": {"containers": [{"name": "worker"}]}, "metadata": {}}
        self.items: dict[str, list[dict[str, Any]]] = {
            "jobs": [
                {
                    "metadata": found(name_of(TASK.id), uid="first"),
                    "spec": {"template": template},
                    "status": {"failed": 1},
                }
            ],
            "pods": [{"metadata": on_its_node, "spec": template["spec"], "status": {"phase": "Running"}}],
        }
        self.made: list[dict[str, Any]] = []

    async def _answer(self, request: web.Request) -> web.Response:
        kind = request.path.rpartition("/")[2]
        if request.method == "GET" and "watch" not in request.query and kind in self.items:
            return web.json_response({"metadata": {"resourceVersion": "2"}, "items": self.items[kind]})
        if request.method != "POST":
            return await super()._answer(request)
        self.asked.append(("POST", kind))
        made = json.loads(await request.text())
        made["metadata"] |= {"uid": "second", "resourceVersion": "3"}
        self.made.append(made)
        return web.json_response(made | {"status": {}})


async def test_a_task_on_a_lost_node_gets_another_job_with_the_attempts_that_are_left() -> None:
    server = WithJob(seconds=60)
    async with server.serving() as cluster:
        state = await cluster.apply_task(TASK, True)
        assert (state.state, state.num_attempts) == (TaskState.WAITING, 2)
        assert server.asked == [("DELETE", "jobs"), ("POST", "jobs")]
        assert server.made[0]["spec"]["backoffLimit"] == 1, "of three attempts one has failed"
        again = await cluster.apply_task(TASK, True)
        assert (again.state, again.num_attempts) == (TaskState.WAITING, 2)
        assert len(server.asked) == 2, "the pod that is lost is not the new Job's"


async def test_a_failed_attempt_is_in_the_row_before_the_job_that_tells_of_it_is_deleted() -> None:
    server = WithJob(seconds=60)
    async with server.serving() as cluster:
        state = await cluster.apply_task(TASK.model_copy(update={"num_failed": 0}), True)
        assert (state.state, state.num_failed) == (TaskState.WAITING, 1)
        assert server.asked == []


async def test_a_service_that_died_between_the_two_jobs_makes_the_second_with_the_attempts_that_are_left() -> None:
    server = WithJob(seconds=60)
    server.items["jobs"].clear()
    async with server.serving() as cluster:
        assert (await cluster.apply_task(TASK, True)).num_failed == 1
        assert server.asked == [("POST", "jobs")]
        assert server.made[0]["spec"]["backoffLimit"] == 1


async def test_a_task_whose_pod_may_still_leave_in_order_keeps_its_job() -> None:
    server = WithJob(seconds=0)
    async with server.serving() as cluster:
        assert (await cluster.apply_task(TASK, True)).state == TaskState.RUNNING
        assert server.asked == []
