"""Speaks TrainingService: parses, calls the domain, replies."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from esd.training.v1 import training_pb2 as pb
from esd.training.v1 import training_pb2_grpc as rpc
from services.common.auth import current_caller
from services.common.structs import json_value, plain, struct
from services.common.times import time_text
from services.common.viewer import Viewer
from services.training import watching
from services.training.configuration import KOHYA
from services.training.domain import Trainings
from services.training.rows import TRAINING, Event, Metric, Training

TRAIN_TYPE = "Stable-diffusion"
Context = grpc.aio.ServicerContext[Any, Any]


class TrainingServicer(rpc.TrainingServiceServicer):
    """The trainings' RPCs."""

    def __init__(self, trainings: Trainings, watch: watching.Watching) -> None:
        self._trainings = trainings
        self._watching = watch

    async def ListTrainingJobs(
        self, request: pb.ListTrainingJobsRequest, context: Context
    ) -> pb.ListTrainingJobsResponse:
        found, next_key = await self._trainings.list_jobs(request.limit, request.exclusive_start_key, _user())
        return pb.ListTrainingJobsResponse(
            trainings=[_item(training) for training in found], last_evaluated_key=json_value(next_key)
        )

    async def CreateTrainingJob(
        self, request: pb.CreateTrainingJobRequest, context: Context
    ) -> pb.CreateTrainingJobResponse:
        deadline = request.deadline_seconds if request.HasField("deadline_seconds") else None
        kind = request.lora_train_type if request.HasField("lora_train_type") else KOHYA
        training = await self._trainings.create_job(kind, plain(request.params), deadline, _user())
        return pb.CreateTrainingJobResponse(
            id=str(training.id),
            status=TRAINING,
            created=_created(training),
            params=struct(training.params),
            input_location=self._trainings.input_location(training),
            output_location=self._trainings.output_location(training),
        )

    async def GetTrainingJob(self, request: pb.GetTrainingJobRequest, context: Context) -> pb.GetTrainingJobResponse:
        training = await self._trainings.get_job(request.job_id, _user())
        return pb.GetTrainingJobResponse(
            id=str(training.id),
            checkpoint_id=str(training.id),
            job_status=training.status,
            model_id=KOHYA,
            params=struct(_params(training)),
            timestamp=_created(training),
            train_type=TRAIN_TYPE,
        )

    async def WatchTrainingJob(
        self, request: pb.WatchTrainingJobRequest, context: Context
    ) -> AsyncIterator[pb.WatchTrainingJobResponse]:
        async for news in self._watching.watch(request.job_id, _user()):
            yield _event(news)

    async def GetTrainingMetrics(
        self, request: pb.GetTrainingMetricsRequest, context: Context
    ) -> pb.GetTrainingMetricsResponse:
        points, num_steps = await self._trainings.get_metrics(request.job_id, request.max_points, _user())
        return pb.GetTrainingMetricsResponse(points=[_point(point) for point in points], num_steps=num_steps)

    async def StopTrainingJob(self, request: pb.StopTrainingJobRequest, context: Context) -> pb.StopTrainingJobResponse:
        await self._trainings.stop_job(request.job_id, _user())
        return pb.StopTrainingJobResponse()

    async def DeleteTrainingJobs(
        self, request: pb.DeleteTrainingJobsRequest, context: Context
    ) -> pb.DeleteTrainingJobsResponse:
        await self._trainings.delete_jobs(list(request.training_id_list), _user())
        return pb.DeleteTrainingJobsResponse()


# --- converters ---


def _user() -> Viewer:
    return Viewer.of(current_caller())


def _created(training: Training) -> str:
    return f"{training.create_time.timestamp():.6f}"


def _params(training: Training) -> dict[str, Any]:
    """The params, with how the training ended (contract 7.6)."""
    if not training.is_ended:
        return training.params
    raw = {"end_time": time_text(training.end_time), "files": [file["name"] for file in training.networks]}
    response: dict[str, Any] = {"raw_resp": raw}
    if training.reason:
        response |= {"status": "Failed", "error_msg": training.reason}
    return training.params | {"resp": response}


def _item(training: Training) -> pb.TrainingListItem:
    model_name = training.params["training_params"].get("model_name")
    return pb.TrainingListItem(
        id=str(training.id),
        model_name=str(model_name or "not_applied"),
        status=training.status,
        train_type=TRAIN_TYPE,
        created=_created(training),
        sagemaker_train_name=f"kohya-{training.create_time:%Y%m%d%H%M%S}",
        params=struct(_params(training)),
    )


def _point(metric: Metric) -> pb.MetricPoint:
    return pb.MetricPoint(
        step=metric.step,
        epoch=metric.epoch,
        loss=metric.loss,
        average_loss=metric.average_loss,
        learning_rates=metric.learning_rates,
    )


def _event(news: watching.News) -> pb.WatchTrainingJobResponse:
    match news:
        case watching.Status(status, waits_for):
            fields: dict[str, Any] = {"status": pb.TrainingStatus(status=status, reason=waits_for)}
        case watching.Step(progress):
            fields = {"step": pb.TrainingStep(**progress)}
        case watching.Noted(event, url):
            fields = {event.kind: _noted(event, url)}
        case watching.Ended(status, reason):
            fields = {"ended": pb.TrainingEnd(status=status, reason=reason)}
        case watching.Ping():
            fields = {"ping": pb.TrainingPing()}
    return pb.WatchTrainingJobResponse(**fields)


def _noted(event: Event, url: str) -> Any:
    if event.kind == "log":
        return pb.TrainingLog(**event.data, time=time_text(event.time))
    return pb.TrainingPicture(**event.data, url=url) if event.kind == "preview" else pb.TrainingFile(**event.data)
