"""The services that training asks: models for what is trained on and for what comes of it, endpoints for compute."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

import grpc

from esd.endpoints.v1 import endpoints_pb2, endpoints_pb2_grpc
from esd.models.v1 import models_pb2, models_pb2_grpc
from services.common.errors import NotFound
from services.common.rpc_errors import answer
from services.common.viewer import Viewer

_TIMEOUT_SECONDS = 10.0
_LOOK_SECONDS = 120.0  # models looks at the files meanwhile


@dataclass(frozen=True)
class Model:
    """A base model's file."""

    name: str
    s3_location: str
    key: str
    size_bytes: int
    sha256: str
    cache_key: str

    def as_dict(self) -> dict[str, Any]:
        """For the training's row."""
        return {name: value for name, value in asdict(self).items() if name != "s3_location"}


class TaskState(Enum):
    """Where a training's task is in its life."""

    WAITING = endpoints_pb2.TASK_STATE_WAITING
    RUNNING = endpoints_pb2.TASK_STATE_RUNNING
    SUCCEEDED = endpoints_pb2.TASK_STATE_SUCCEEDED
    FAILED = endpoints_pb2.TASK_STATE_FAILED
    STOPPED = endpoints_pb2.TASK_STATE_STOPPED


@dataclass(frozen=True)
class Task:
    """A training's task; `reason` is what it waits for, or why it ended."""

    state: TaskState
    reason: str


class Models:
    """The models service. Every method raises Unavailable when it does not answer."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = models_pb2_grpc.ModelsServiceStub(channel)

    async def find_model(self, kind: str, name: str, user: Viewer) -> Model | None:
        """The active file of the type and name that the user may use."""
        request = models_pb2.ResolveCheckpointsRequest(
            names=[models_pb2.CheckpointName(type=kind, name=name)],
            username=user.name,
            roles=user.roles,
            sees_everything=user.sees_everything,
        )
        response = await answer(self._stub.ResolveCheckpoints(request, timeout=_TIMEOUT_SECONDS), "models")
        for file in response.checkpoints:
            cache_key = file.sha256 or f"{file.id}/{file.name}"
            return Model(file.name, file.s3_location, file.key, file.size_bytes, file.sha256, cache_key)
        return None

    async def find_dataset(self, name: str, user: Viewer) -> str | None:
        """The prefix of the keys of a dataset that the user may see."""
        request = models_pb2.ResolveDatasetRequest(
            dataset_name=name, username=user.name, roles=user.roles, sees_everything=user.sees_everything
        )
        try:
            response = await answer(self._stub.ResolveDataset(request, timeout=_TIMEOUT_SECONDS), "models")
        except NotFound:
            return None
        return str(response.prefix)

    async def create_checkpoint(self, training_id: str, name: str, user: Viewer) -> None:
        """Opens the training's checkpoint.

        Raises:
            FailedPrecondition: the name is in use.
        """
        request = models_pb2.CreateTrainedCheckpointRequest(
            checkpoint_id=training_id, name=name, username=user.name, roles=user.roles
        )
        await answer(self._stub.CreateTrainedCheckpoint(request, timeout=_TIMEOUT_SECONDS), "models")

    async def finish_checkpoint(
        self, training_id: str, files: Iterable[tuple[str, str]], reason: str
    ) -> tuple[list[str], str]:
        """Fills the checkpoint with (name, SHA-256) files; answers its names, and why it was refused."""
        request = models_pb2.FinishTrainedCheckpointRequest(
            checkpoint_id=training_id,
            files=[models_pb2.TrainedFile(name=name, sha256=sha256) for name, sha256 in files],
            reason=reason,
        )
        response = await answer(self._stub.FinishTrainedCheckpoint(request, timeout=_LOOK_SECONDS), "models")
        return list(response.names), response.reason

    async def delete_checkpoint(self, training_id: str) -> bool:
        """Deletes the checkpoint unless it is Active; True: it is."""
        request = models_pb2.DeleteTrainedCheckpointRequest(checkpoint_id=training_id)
        response = await answer(self._stub.DeleteTrainedCheckpoint(request, timeout=_TIMEOUT_SECONDS), "models")
        return bool(response.was_kept)


class Tasks:
    """The endpoints service's tasks. Every method raises Unavailable when it does not answer."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = endpoints_pb2_grpc.TaskServiceStub(channel)

    async def start(self, training_id: str, instance_type: str, attempts: int, deadline_seconds: int) -> Task:
        """Asks for the training's task; one that was asked for before stays as it is."""
        request = endpoints_pb2.StartTaskRequest(
            task_id=training_id,
            kind=endpoints_pb2.TASK_KIND_TRAIN,
            instance_type=instance_type,
            max_attempts=attempts,
            deadline_seconds=deadline_seconds,
        )
        return _task((await answer(self._stub.StartTask(request, timeout=_TIMEOUT_SECONDS), "endpoints")).task)

    async def get(self, training_id: str) -> Task | None:
        """The training's task, if it was asked for."""
        request = endpoints_pb2.GetTaskRequest(task_id=training_id)
        try:
            return _task((await answer(self._stub.GetTask(request, timeout=_TIMEOUT_SECONDS), "endpoints")).task)
        except NotFound:
            return None

    async def stop(self, training_id: str) -> None:
        """Has the task leave, if there is one."""
        request = endpoints_pb2.StopTaskRequest(task_id=training_id)
        try:
            await answer(self._stub.StopTask(request, timeout=_TIMEOUT_SECONDS), "endpoints")
        except NotFound:
            return


def _task(task: endpoints_pb2.Task) -> Task:
    return Task(TaskState(task.state), task.reason)
