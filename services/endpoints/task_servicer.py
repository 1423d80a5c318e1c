"""Speaks TaskService: parses, calls the domain, replies."""

from __future__ import annotations

from typing import Any

from esd.endpoints.v1 import endpoints_pb2 as pb
from esd.endpoints.v1 import endpoints_pb2_grpc as rpc
from services.common.auth import current_caller
from services.endpoints.rows import Task, TaskState
from services.endpoints.tasks import TRAIN, NewTask, Tasks

_KINDS = {pb.TASK_KIND_TRAIN: TRAIN}
_STATES = {
    TaskState.WAITING: pb.TASK_STATE_WAITING,
    TaskState.RUNNING: pb.TASK_STATE_RUNNING,
    TaskState.SUCCEEDED: pb.TASK_STATE_SUCCEEDED,
    TaskState.FAILED: pb.TASK_STATE_FAILED,
    TaskState.STOPPED: pb.TASK_STATE_STOPPED,
}


class TaskServicer(rpc.TaskServiceServicer):
    """The tasks' RPCs."""

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks

    async def StartTask(self, request: pb.StartTaskRequest, context: Any) -> pb.StartTaskResponse:
        new = NewTask(
            task_id=request.task_id,
            kind=_KINDS[request.kind],
            instance_type=request.instance_type,
            max_attempts=request.max_attempts or 1,
            deadline_seconds=request.deadline_seconds or None,
        )
        return pb.StartTaskResponse(task=_message(await self._tasks.start_task(new, current_caller().name)))

    async def GetTask(self, request: pb.GetTaskRequest, context: Any) -> pb.GetTaskResponse:
        return pb.GetTaskResponse(task=_message(await self._tasks.get_task(request.task_id, current_caller().name)))

    async def StopTask(self, request: pb.StopTaskRequest, context: Any) -> pb.StopTaskResponse:
        await self._tasks.stop_task(request.task_id, current_caller().name)
        return pb.StopTaskResponse()


def _message(task: Task) -> pb.Task:
    return pb.Task(
        task_id=task.id, state=_STATES[TaskState(task.state)], reason=task.reason, num_attempts=task.num_attempts
    )
