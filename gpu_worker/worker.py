"""A job's way through the worker, whichever door it came by: fetch → engine → upload, and its events."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import structlog

from esd.worker.v1 import worker_pb2
from gpu_worker import results
from gpu_worker.cache import CachedModel, ModelCache
from gpu_worker.engine import INTERNAL, Engine, Produced
from gpu_worker.job import Job, JobCancelled, JobError, Txt2Img, to_python
from gpu_worker.transfer import Transfer

log = structlog.get_logger()

TASK_TYPES = ("txt2img",)
_MAX_JOBS = 1  # before and in the engine
_MAX_UPLOADING = 4
_PROGRESS_INTERVAL_SECONDS = 0.2


class Worker:
    """Runs jobs. `on_change` is called when room or readiness may have changed."""

    def __init__(self, engine: Engine, cache: ModelCache, transfer: Transfer) -> None:
        self._engine = engine
        self._cache = cache
        self._transfer = transfer
        self._tasks: dict[Job, asyncio.Task[None]] = {}
        self._num_uploading = 0
        self.on_change: Callable[[], None] = lambda: None
        engine.ready.add_done_callback(lambda _: self.on_change())

    @property
    def room(self) -> int:
        """How many more jobs the worker can take now. While results are uploaded the GPU takes the next job."""
        ready = self._engine.ready
        if not ready.done() or ready.cancelled() or ready.exception() or self._num_uploading >= _MAX_UPLOADING:
            return 0
        return max(0, _MAX_JOBS - (len(self._tasks) - self._num_uploading))

    @property
    def device(self) -> str:
        """What the engine runs on."""
        return self._engine.device

    @property
    def warm_models(self) -> tuple[str, ...]:
        """Cache keys of the models in memory."""
        return self._engine.warm_models

    def submit(self, job: Job) -> None:
        """Runs the job to its last event. It waits its turn when there is no room."""
        self._tasks[job] = asyncio.create_task(self._run(job))
        self.on_change()

    async def stop(self) -> None:
        """Cancels what still runs and waits for its end."""
        for job in self._tasks:
            job.cancel()
        await asyncio.gather(*self._tasks.values())

    async def _run(self, job: Job) -> None:
        with structlog.contextvars.bound_contextvars(job_id=job.id):
            try:
                last = worker_pb2.JobEvent(done=await self._do(job))
            except JobCancelled:
                last = _failed("the job was cancelled", cancelled=True)
            except JobError as error:
                last = _failed(str(error))
            except Exception:  # the job fails; the worker lives
                log.exception("job failed")
                last = _failed(INTERNAL)
            log.info("job ended", outcome=last.WhichOneof("event"), reason=last.failed.reason or None)
        del self._tasks[job]
        job.emit(last)
        self.on_change()

    async def _do(self, job: Job) -> worker_pb2.JobDone:
        """The job's three stages.

        Raises:
            JobError, JobCancelled.
        """
        if job.spec.task_type not in TASK_TYPES:
            possible = ", ".join(TASK_TYPES)
            raise JobError(
                f"task type {job.spec.task_type!r} is not supported by this worker yet; possible: {possible}"
            )
        async with AsyncExitStack() as held:
            began = time.monotonic()
            payload = await job.stage(self._payload(job))
            request = Txt2Img.from_payload(payload, job.id)
            if len(job.spec.image_uploads) < request.num_images:
                raise JobError(f"the job makes {request.num_images} images, but has a place for only some of them")
            files = await job.stage(self._fetch(job, held))
            fetch_seconds = time.monotonic() - began
            await asyncio.shield(self._engine.ready)
            progress = _Progress(job, request.steps * request.num_images)
            produced = await job.stage(self._engine.run(job.id, request, files, progress.started, progress.step))
        self._num_uploading += 1
        self.on_change()
        try:
            done = await job.stage(self._finish(job, payload, request, files, produced))
        finally:
            self._num_uploading -= 1
        done.timings.fetch_seconds = fetch_seconds
        return done

    async def _payload(self, job: Job) -> dict[str, Any]:
        if not job.spec.payload_url:
            payload: dict[str, Any] = to_python(job.spec.payload)
            return payload
        content = await self._transfer.read(job.spec.payload_url, "the payload", job.spec.payload_sha256)
        return await asyncio.to_thread(_parse, content)

    async def _fetch(self, job: Job, held: AsyncExitStack) -> list[CachedModel]:
        """The model files, in the cache for as long as `held` is open."""
        used = [
            next((model for model in job.spec.models if model.type == kind), None)
            for kind in ("Stable-diffusion", "VAE")
        ]
        if used[0] is None:
            raise JobError("the job names no model of type Stable-diffusion")
        return [await held.enter_async_context(self._cache.hold(model)) for model in used if model is not None]

    async def _finish(
        self, job: Job, payload: dict[str, Any], request: Txt2Img, files: list[CachedModel], produced: Produced
    ) -> worker_pb2.JobDone:
        """Encodes and uploads everything at once."""
        began = time.monotonic()
        vae = files[1] if len(files) > 1 else None
        origin = results.Origin(files[0].name, files[0].sha256, vae.name if vae else None, vae.sha256 if vae else None)
        infotexts = [results.infotext(request, index, origin) for index in range(request.num_images)]
        images = await asyncio.gather(
            *(
                asyncio.to_thread(results.png, pixels, text)
                for pixels, text in zip(produced.images, infotexts, strict=True)
            )
        )
        param = results.param_json(payload, request, origin, infotexts, job.spec.endpoint_name, job.id)
        encoded = time.monotonic()
        uploads = [*job.spec.image_uploads[: len(images)], job.spec.param_upload]
        objects = await asyncio.gather(
            *(self._upload(upload, content) for upload, content in zip(uploads, [*images, param], strict=True))
        )
        timings = worker_pb2.Timings(
            load_seconds=produced.load_seconds,
            pipeline_seconds=produced.pipeline_seconds,
            encode_seconds=encoded - began,
            upload_seconds=time.monotonic() - encoded,
        )
        return worker_pb2.JobDone(images=objects[:-1], param=objects[-1], timings=timings)

    async def _upload(self, upload: worker_pb2.Upload, content: bytes) -> worker_pb2.ResultObject:
        await self._transfer.upload(upload.url, content, upload.name)
        sha256 = hashlib.sha256(content).hexdigest()
        return worker_pb2.ResultObject(name=upload.name, size_bytes=len(content), sha256=sha256)


class _Progress:
    """Tells a job's progress, not more often than anybody can see: the first step, the last, and some between."""

    def __init__(self, job: Job, num_steps: int) -> None:
        self._job = job
        self._num_steps = num_steps
        self._told_at = 0.0

    def started(self) -> None:
        self._job.emit(worker_pb2.JobEvent(started=worker_pb2.JobStarted()))

    def step(self, step: int) -> None:
        now = time.monotonic()
        if now - self._told_at >= _PROGRESS_INTERVAL_SECONDS or step == self._num_steps:
            self._told_at = now
            progress = worker_pb2.JobProgress(step=step, num_steps=self._num_steps)
            self._job.emit(worker_pb2.JobEvent(progress=progress))


def is_last(event: worker_pb2.JobEvent) -> bool:
    """Whether a job's life ends with the event."""
    return event.WhichOneof("event") in ("done", "failed")


def _failed(reason: str, cancelled: bool = False) -> worker_pb2.JobEvent:
    return worker_pb2.JobEvent(failed=worker_pb2.JobFailed(reason=reason, cancelled=cancelled))


def _parse(content: bytes) -> dict[str, Any]:
    """A payload as the client writes it: Python's JSON, with Infinity but without NaN (contract 10.1)."""

    def constant(name: str) -> float:
        if name == "NaN":
            raise ValueError
        return math.copysign(sys.float_info.max, float(name))

    try:
        payload = json.loads(content, parse_constant=constant)
    except ValueError:
        raise JobError("the payload is not JSON") from None
    if not isinstance(payload, dict):
        raise JobError("the payload is not a JSON object")
    return payload
