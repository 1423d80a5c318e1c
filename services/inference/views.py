"""What is shown of a job beside its own columns: locations, fresh URLs, and the `params` of contract 6.1."""

from __future__ import annotations

from typing import Any

from services.common.blobs import Blobs
from services.common.times import time_text
from services.inference.peers import Model
from services.inference.rows import Job
from services.inference.submitting.choices import SIMPLE_TASKS


class Views:
    """Shows jobs."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs

    def input_location(self, job: Job) -> str:
        """Where the payload is or will be, `s3://…`."""
        return self._blobs.url(job.input_key)

    def output_location(self, job: Job) -> str | None:
        """Where the raw answer of an Async job is or will be, `s3://…`."""
        return self._blobs.url(job.output_key) if job.output_key else None

    def params(self, job: Job) -> dict[str, Any]:
        """The `params` of contract 6.1; what follows output_path is our own."""
        used_models: dict[str, list[dict[str, str]]] = {}
        for model in (Model(**row) for row in job.models):
            used = {"id": model.id, "model_name": model.name, "s3": model.s3_location, "type": model.type}
            used_models.setdefault(model.type, []).append(used)
        params = {
            "input_body_s3": self.input_location(job),
            "input_body_presign_url": job.input_url,
            "sagemaker_inference_endpoint_id": str(job.endpoint_id),
            "sagemaker_inference_endpoint_name": job.endpoint_name,
            "sagemaker_inference_instance_type": job.instance_type,
            "used_models": used_models if job.task_type in SIMPLE_TASKS else None,
            "output_path": self.output_location(job),
            "priority": job.priority or None,
            "deadline_seconds": job.deadline_seconds,
            "results": job.result_objects,
            "timings": _timings(job) if job.is_ended else None,
            "cancelled": True if job.is_cancelled else None,
        }
        return {name: value for name, value in params.items() if value is not None}

    def result_urls(self, job: Job) -> tuple[list[str], list[str]]:
        """Fresh GET URLs of the images and of the result's description, valid for an hour."""
        images = [self._blobs.presign_get(job.result_prefix + name) for name in job.image_names or []]
        return images, [self._blobs.presign_get(job.result_prefix + job.param_name)]


def _timings(job: Job) -> dict[str, Any]:
    times = {
        "submit_time": job.submit_time,
        "claim_time": job.claim_time,
        "start_time": job.start_time,
        "complete_time": job.complete_time,
    }
    return {name: time_text(time) for name, time in times.items() if time is not None} | (job.timings or {})
