"""InferenceService: jobs over the wire."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict

from esd.inference.v1 import inference_pb2 as pb
from esd.inference.v1 import inference_pb2_grpc
from services.common.auth import current_caller, enforce
from services.common.errors import InvalidArgument
from services.common.status import set_reply
from services.common.structs import json_value, list_value
from services.common.times import time_text
from services.common.viewer import Viewer
from services.inference.domain import Inference, Wanted
from services.inference.rows import REAL_TIME, Job, Webhook
from services.inference.submitting.choices import SIMPLE_TASKS, Draft
from services.inference.views import Views
from services.inference.watching import events
from services.inference.webhooks.domain import Webhooks

_MAX_KEY_CHARACTERS = 255


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Parses, calls the domain, replies."""

    def __init__(self, inference: Inference, views: Views, watching: events.Events, webhooks: Webhooks) -> None:
        self._inference = inference
        self._views = views
        self._watching = watching
        self._webhooks = webhooks

    async def CreateInferenceJob(
        self, request: pb.CreateInferenceJobRequest, context: grpc.aio.ServicerContext
    ) -> pb.CreateInferenceJobResponse:
        payload_string = request.payload_string if request.HasField("payload_string") else None
        if payload_string is not None:
            await self._inference.check_payload_string(payload_string)
        enforce()
        key = _idempotency_key(context)
        draft = Draft(
            task_type=request.task_type,
            inference_type=request.inference_type,
            models=MessageToDict(request.models),
            payload_string=payload_string,
            endpoint_name=request.sagemaker_endpoint_name,
            priority=request.priority,
            deadline_seconds=request.deadline_seconds if request.HasField("deadline_seconds") else None,
            idempotency_key=key,
            body_sha256=hashlib.sha256(request.SerializeToString(deterministic=True)).hexdigest() if key else "",
            webhook=request.webhook,
            webhook_secret=request.webhook_secret,
        )
        job = await self._inference.create_job(draft, _user())
        if payload_string is not None:
            return pb.CreateInferenceJobResponse(**self._started(job))
        return pb.CreateInferenceJobResponse(inference=self._created(job))

    async def StartInferenceJob(
        self, request: pb.StartInferenceJobRequest, context: grpc.aio.ServicerContext
    ) -> pb.StartInferenceJobResponse:
        job = await self._inference.start_job(request.job_id, _user())
        return pb.StartInferenceJobResponse(**self._started(job))

    async def GetInferenceJob(
        self, request: pb.GetInferenceJobRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetInferenceJobResponse:
        job = await self._inference.get_job(request.job_id, _user_or_anybody())
        return pb.GetInferenceJobResponse(data=self._detail(job))

    async def CancelInferenceJob(
        self, request: pb.CancelInferenceJobRequest, context: grpc.aio.ServicerContext
    ) -> pb.CancelInferenceJobResponse:
        job = await self._inference.cancel_job(request.job_id, _user())
        return pb.CancelInferenceJobResponse(data=self._detail(job))

    async def WatchInferenceJob(
        self, request: pb.WatchInferenceJobRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.WatchInferenceJobResponse]:
        async for event in self._watching.watch(request.job_id, _user_or_anybody()):
            yield _event(event)

    async def ListInferenceJobs(
        self, request: pb.ListInferenceJobsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListInferenceJobsResponse:
        wanted = Wanted(
            task_type=request.type or request.task_type,
            username=request.username,
            status=request.status,
            endpoint_name=request.endpoint,
            start_time=request.start_time,
            end_time=request.end_time,
            limit=request.limit,
            start_key=request.exclusive_start_key,
        )
        jobs, next_key = await self._inference.list_jobs(wanted, _user_or_anybody())
        return pb.ListInferenceJobsResponse(
            inferences=[self._item(job) for job in jobs], last_evaluated_key=json_value(next_key)
        )

    async def DeleteInferenceJobs(
        self, request: pb.DeleteInferenceJobsRequest, context: grpc.aio.ServicerContext
    ) -> pb.DeleteInferenceJobsResponse:
        await self._inference.delete_jobs(list(request.inference_id_list), _user_or_anybody())
        return pb.DeleteInferenceJobsResponse()

    async def ListWebhooks(
        self, request: pb.ListWebhooksRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListWebhooksResponse:
        webhooks, next_key = await self._webhooks.list_webhooks(
            request.state, request.limit, request.exclusive_start_key, _user()
        )
        return pb.ListWebhooksResponse(
            webhooks=[_webhook(webhook) for webhook in webhooks], last_evaluated_key=json_value(next_key)
        )

    async def ResendWebhook(
        self, request: pb.ResendWebhookRequest, context: grpc.aio.ServicerContext
    ) -> pb.ResendWebhookResponse:
        webhook = await self._webhooks.resend_webhook(request.job_id, _user())
        return pb.ResendWebhookResponse(data=_webhook(webhook))

    # --- converters ---

    def _created(self, job: Job) -> pb.JobReceipt:
        receipt = pb.JobReceipt(
            id=str(job.id),
            type=job.task_type,
            api_params_s3_location=self._views.input_location(job),
            api_params_s3_upload_url=job.input_url,
        )
        if job.task_type in SIMPLE_TASKS:
            named = ({"id": row["id"], "name": row["all_names"], "type": row["type"]} for row in job.models)
            receipt.models.CopyFrom(list_value(list(named)))
        return receipt

    def _started(self, job: Job) -> dict[str, Any]:
        """The answer to a start: 200 with the finished Real-time job, 202 with a receipt for an Async one."""
        if job.inference_type == REAL_TIME:
            set_reply(200)
            return {"data": self._detail(job)}
        set_reply(202)
        receipt = pb.JobReceipt(
            inference_id=str(job.id),
            status=job.status,
            endpoint_name=job.endpoint_name,
            output_path=self._views.output_location(job),
        )
        return {"inference": receipt}

    def _detail(self, job: Job) -> pb.InferenceJob:
        """A job with URLs; what is unset is absent."""
        set_fields: dict[str, Any] = {
            name: json_value(value) for name, value in self._nullable(job).items() if value is not None
        }
        images, outputs = self._views.result_urls(job)
        set_fields |= {"img_presigned_urls": list_value(images), "output_presigned_urls": list_value(outputs)}
        return pb.InferenceJob(**_always(job), **set_fields)

    def _item(self, job: Job) -> pb.InferenceJob:
        """A job in a list; what is unset is null."""
        fields: dict[str, Any] = {name: json_value(value) for name, value in self._nullable(job).items()}
        return pb.InferenceJob(**_always(job), **fields)

    def _nullable(self, job: Job) -> dict[str, Any]:
        succeeded = job.status == "succeed"
        return {
            "start_time": time_text(job.start_time or job.create_time),
            "complete_time": time_text(job.complete_time),
            "image_names": job.image_names,
            "inference_info_name": f"/tmp/{job.param_name}" if succeeded else None,  # noqa: S108 - an opaque name
            "sagemaker_raw": job.failure,
            "payload_string": job.payload_string,
            "params": self._views.params(job),
        }


def _user() -> Viewer:
    return Viewer.of(current_caller())


def _user_or_anybody() -> Viewer:
    """The caller of an RPC where the WebUI client names nobody: its key shows, and deletes, everybody's jobs."""
    return Viewer.of(current_caller(), anonymous_sees_everything=True)


def _idempotency_key(context: grpc.aio.ServicerContext) -> str:
    """The header `Idempotency-Key`, or nothing.

    Raises:
        InvalidArgument: it is too long to be kept.
    """
    key = str(dict(context.invocation_metadata() or ()).get("idempotency-key", ""))
    if len(key) > _MAX_KEY_CHARACTERS:
        raise InvalidArgument(
            f"the Idempotency-Key has {len(key)} characters; at most {_MAX_KEY_CHARACTERS} are possible"
        )
    return key


def _always(job: Job) -> dict[str, Any]:
    """What every job has."""
    return {
        "id": str(job.id),
        "status": job.status,
        "task_type": job.task_type,
        "inference_type": job.inference_type,
        "owner_group_or_role": [job.owner],
        "create_time": time_text(job.create_time),
    }


def _webhook(webhook: Webhook) -> pb.Webhook:
    return pb.Webhook(
        job_id=str(webhook.job_id),
        url=webhook.url.partition("?")[0],
        message_id=str(webhook.message_id),
        state=webhook.state,
        num_attempts=webhook.num_attempts,
        last_error=json_value(webhook.last_error),
        create_time=time_text(webhook.create_time),
        end_time=json_value(time_text(webhook.end_time)),
    )


def _event(event: events.Event) -> pb.WatchInferenceJobResponse:
    message = pb.WatchInferenceJobResponse()
    match event:
        case events.Created():
            message.created.SetInParent()
        case events.Queued(position, time):
            message.queued.position = position
            if time is not None:
                message.queued.estimated_start_time.string_value = time_text(time)
        case events.Started():
            message.started.SetInParent()
        case events.Step(step, num_steps):
            message.step.MergeFrom(pb.JobStep(step=step, num_steps=num_steps))
        case events.Preview(jpeg):
            message.preview.jpeg = jpeg
        case events.Image(index, name, url):
            message.image.MergeFrom(pb.JobImage(index=index, name=name, url=url))
        case events.Done():
            message.done.SetInParent()
        case events.Failed(reason):
            message.failed.reason = reason
        case events.Ping():
            message.ping.SetInParent()
    return message
