"""A job's way through the worker, whichever door it came by: fetch → engine → upload, and its events."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from itertools import chain, repeat
from typing import Any, TypeVar

import structlog
from PIL import Image

from esd.worker.v1 import worker_pb2
from gpu_worker import painting
from gpu_worker.company import Company
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.run import Produced
from gpu_worker.files.cache import CachedModel, ModelCache
from gpu_worker.files.transfer import DiskFailed, Transfer, Unreached, UrlExpired
from gpu_worker.job import INTERNAL, Job, JobCancelled, JobError, NoMemory
from gpu_worker.pictures import extras, hints, results
from gpu_worker.pictures.canvas import Canvas
from gpu_worker.pictures.infotext import infotext
from gpu_worker.pictures.provenance import Provenance
from services.common import payloads
from services.common.errors import InvalidArgument
from services.common.payloads import Edit, Generation, Payload, pictures
from services.common.sentences import MAX_REASON, printable
from services.common.structs import plain
from services.common.tasks import together

log = structlog.get_logger()
T = TypeVar("T")

_MAX_UPLOADING = 4  # for each job that the engine may have
_FRESH_SECONDS = 60.0  # URLs that the store calls expired so soon after they came: new ones would be no better


class Worker:
    """Runs jobs. `on_change` is called when room or readiness may have changed."""

    def __init__(self, engine: Engine, cache: ModelCache, transfer: Transfer, max_jobs: int) -> None:
        self._engine = engine
        self._cache = cache
        self._transfer = transfer
        self._max_jobs = max_jobs  # before and in the engine
        # The next job is taken to be as large as the last one; the first, to be a guided one of 512x512.
        self._typical_pixels = 2 * 512 * 512
        self._tasks: dict[Job, asyncio.Task[None]] = {}
        self._preloading: asyncio.Task[None] | None = None
        self._num_uploading = 0
        self._company = Company(self._say_change)
        self._is_stopping = False
        self.on_change: Callable[[], None] = lambda: None
        engine.ready.add_done_callback(lambda _: self.on_change())
        engine.on_warm = self._say_change
        transfer.reach.on_change = self._say_change

    @property
    def room(self) -> int:
        """How many more jobs the worker can take now: those that fit into one UNet call, so that jobs wait where
        another worker can have them. While results are uploaded the GPU takes the next job. While the object store is
        away there is no room, nor while a job is to have the GPU for itself."""
        ready = self._engine.ready
        if (
            not ready.done()
            or ready.cancelled()
            or ready.exception()
            or self._transfer.reach.is_away
            or self._company.is_closed
            or self._num_uploading >= _MAX_UPLOADING * self._max_jobs
        ):
            return 0
        num_fitting = max(1, self._engine.max_pixels // self._typical_pixels)
        return max(0, min(self._max_jobs, num_fitting) - (len(self._tasks) - self._num_uploading))

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
        if self._is_stopping:  # it was on its way
            job.cancel()
        self._tasks[job] = asyncio.create_task(self._run(job))
        self.on_change()

    def _say_change(self) -> None:
        self.on_change()  # which whoever serves the worker sets later

    def preload(self, models: list[worker_pb2.ModelFile]) -> None:
        """Fetches these and keeps them in memory as long as no job needs the room, instead of those named before."""
        before = self._preloading
        if before is not None:
            before.cancel()
        self._preloading = asyncio.create_task(self._preload(models)) if models or before is not None else None

    async def stop(self) -> None:
        """Cancels what still runs, and waits until each job has told how it ended."""
        self._is_stopping = True
        for job in self._tasks:
            job.cancel()
        preloading = [] if self._preloading is None else [self._preloading]
        for task in preloading:
            task.cancel()
        await asyncio.gather(*self._tasks.values())
        await asyncio.gather(*preloading, return_exceptions=True)

    async def _preload(self, models: list[worker_pb2.ModelFile]) -> None:
        """Holds the files in the cache until cancelled, and has the engine load each as soon as it is here."""
        async with AsyncExitStack() as held:
            files: list[CachedModel] = []
            self._engine.pin(files)
            for model in models:
                try:
                    files.append(await self._held(model, held))
                except (JobError, OSError) as error:  # of a disk, say; the others are held on
                    log.warning("a model cannot be kept ready", name=model.name, reason=str(error))
                    continue
                self._engine.pin(list(files))
            await asyncio.Event().wait()

    async def _held(self, model: worker_pb2.ModelFile, held: AsyncExitStack) -> CachedModel:
        """The file in the cache, whenever the object store is there to fetch it from."""
        while True:
            try:
                return await held.enter_async_context(self._cache.hold(model))
            except Unreached as error:
                log.warning("a model that is to be kept ready waits for the object store", reason=str(error))
                await self._transfer.reach.wait()

    async def _run(self, job: Job) -> None:
        with structlog.contextvars.bound_contextvars(job_id=job.id):
            try:
                last = worker_pb2.JobEvent(done=await self._do(job))
            except JobCancelled:
                last = self._cut_off(job)
            except Unreached as error:
                last = _failed(job, str(error), postponed=True)
            except UrlExpired as error:
                last = _failed(job, str(error), postponed=time.monotonic() - job.taken_at > _FRESH_SECONDS)
            except DiskFailed as error:
                last = _failed(job, str(error), declined=True)
            except JobError as error:
                last = _failed(job, str(error))
            except Exception:  # the job fails; the worker lives
                log.exception("job failed")
                last = _failed(job, INTERNAL)
            log.info("job ended", outcome=last.WhichOneof("event"), reason=last.failed.reason or None)
        del self._tasks[job]
        job.emit(last)
        self.on_change()

    def _cut_off(self, job: Job) -> worker_pb2.JobEvent:
        """What is told of a job that was told to stop, for itself or with this worker. In that case others may have it,
        and one that had only to be uploaded has not lost an attempt."""
        if self._is_stopping and job.has_uploaded:
            return _failed(job, "the worker ended before the object store had taken the results", postponed=True)
        return _failed(job, "the worker ended" if self._is_stopping else "the job was cancelled", cancelled=True)

    async def _do(self, job: Job) -> worker_pb2.JobDone:
        """The job's three stages.

        Raises:
            JobError, JobCancelled.
        """
        async with AsyncExitStack() as held:
            began = time.monotonic()
            request, canvas = await job.stage(self._request(job))
            if len(job.spec.image_uploads) < request.num_images:
                raise JobError(f"the job makes {request.num_images} images, but has a place for only some of them")
            if isinstance(request, Generation):
                self._typical_pixels = request.num_pixels
                self.on_change()
            files = await job.stage(self._fetch(job, request, held))
            fetch_seconds = time.monotonic() - began
            if isinstance(request, Edit):
                return await job.stage(self._retouch(job, request, files, fetch_seconds))
            assert isinstance(request, Generation)
            await asyncio.shield(self._engine.ready)
            job.audience.show = lambda jpeg: self._show(job, jpeg)
            made = await job.stage(
                self._in_engine(lambda: painting.produced(self._engine, job, request, files, canvas))
            )
        self._num_uploading += 1
        self.on_change()
        try:
            done = await job.stage(self._finish(job, request, canvas, files, made))
        finally:
            self._num_uploading -= 1
        done.timings.fetch_seconds = fetch_seconds
        return done

    async def _in_engine(self, work: Callable[[], Awaitable[T]]) -> T:
        """What the engine makes of a job. Where the device has not the memory for it beside others, it is done once
        more when they have ended, and no others are taken meanwhile."""
        async with self._company.joined() as had_company:
            try:
                return await work()
            except NoMemory:
                if not had_company():
                    raise
        log.warning("a job that did not fit the memory waits to be alone")
        async with self._company.alone():
            return await work()

    def _show(self, job: Job, jpeg: bytes) -> None:
        if job in self._tasks:  # else its last event was told while this was drawn
            job.emit(worker_pb2.JobEvent(preview=worker_pb2.JobPreview(jpeg=jpeg)))

    async def _request(self, job: Job) -> tuple[Payload, Canvas]:
        """What the job asks for, and what it paints on."""
        if not job.spec.payload_url:
            return await asyncio.to_thread(_checked, job, plain(job.spec.payload))
        content = await self._transfer.read(job.spec.payload_url, "the payload", job.spec.payload_sha256)
        return await asyncio.to_thread(_checked, job, content)

    async def _fetch(self, job: Job, request: Payload, held: AsyncExitStack) -> list[CachedModel]:
        """The files of the models that the request uses, in the cache for as long as `held` is open."""
        models = [(model.type, model.name) for model in job.spec.models]
        try:
            used = payloads.used(request, models)
        except InvalidArgument as error:
            raise JobError(str(error)) from None
        try:
            return [await held.enter_async_context(self._cache.hold(job.spec.models[index])) for index in used]
        except OSError as error:
            raise DiskFailed(f"the worker's disk cannot be used: {error.strerror}") from error

    async def _finish(
        self, job: Job, request: Generation, canvas: Canvas, files: list[CachedModel], made: list[Produced]
    ) -> worker_pb2.JobDone:
        """Encodes and uploads everything at once."""
        began = time.monotonic()
        unfit = sorted({file.name for run in made for file in run.unfit})
        files = [file for file in files if any(file not in run.unfit for run in made)]
        provenance = Provenance(job.id, job.spec.task_type, request, files, self.device)
        pictures, makings = await asyncio.to_thread(painting.pictures, request, files, canvas, made)
        infotexts = [infotext(making) for making in makings]
        images = await _encoded(pictures, provenance, infotexts)
        ignored = [f"embedding {name}, made for another architecture" for name in unfit]
        info = results.info(request, makings, infotexts, ignored, any(run.is_inpainting for run in made))
        param = results.param_json(provenance, job.spec.endpoint_name, info=info)
        timings = worker_pb2.Timings(
            load_seconds=max(run.load_seconds for run in made),
            pipeline_seconds=sum(run.pipeline_seconds for run in made),
            encode_seconds=time.monotonic() - began,
        )
        return await self._uploaded(job, images, param, timings)

    async def _retouch(
        self, job: Job, request: Edit, files: list[CachedModel], fetch_seconds: float
    ) -> worker_pb2.JobDone:
        """Changes pictures without a checkpoint, and uploads them."""
        began = time.monotonic()
        try:
            images = await asyncio.to_thread(extras.decoded, request)
        except pictures.Damaged as error:
            raise JobError(str(error)) from None
        enlarged = await self._in_engine(lambda: painting.enlarged(self._engine, job, request, files, images))
        retouched = await asyncio.to_thread(extras.retouched, request, images, files, enlarged)
        made = time.monotonic()
        provenance = Provenance(job.id, job.spec.task_type, request, files, self.device)
        encoded = await _encoded(retouched, provenance)
        html_info = extras.html_info(request, files)
        param = results.param_json(provenance, job.spec.endpoint_name, info={}, html_info=html_info)
        timings = worker_pb2.Timings(
            fetch_seconds=fetch_seconds, pipeline_seconds=made - began, encode_seconds=time.monotonic() - made
        )
        return await self._uploaded(job, encoded, param, timings)

    async def _uploaded(
        self, job: Job, images: list[bytes], param: bytes, timings: worker_pb2.Timings
    ) -> worker_pb2.JobDone:
        began = time.monotonic()
        job.has_uploaded = True
        uploads = [*job.spec.image_uploads[: len(images)], job.spec.param_upload]
        contents = zip(uploads, [*images, param], strict=True)
        async with together() as group:  # so that beside one that is refused none goes on
            uploading = [group.create_task(self._upload(upload, content)) for upload, content in contents]
        objects = [task.result() for task in uploading]
        timings.upload_seconds = time.monotonic() - began
        return worker_pb2.JobDone(images=objects[:-1], param=objects[-1], timings=timings)

    async def _upload(self, upload: worker_pb2.Upload, content: bytes) -> worker_pb2.ResultObject:
        await self._transfer.upload(upload.url, content, upload.name)
        sha256 = hashlib.sha256(content).hexdigest()
        return worker_pb2.ResultObject(name=upload.name, size_bytes=len(content), sha256=sha256)


def is_last(event: worker_pb2.JobEvent) -> bool:
    """Whether a job's life ends with the event."""
    return event.WhichOneof("event") in ("done", "failed")


def _failed(
    job: Job, reason: str, *, cancelled: bool = False, postponed: bool = False, declined: bool = False
) -> worker_pb2.JobEvent:
    failed = worker_pb2.JobFailed(
        reason=printable(reason, MAX_REASON),  # it may quote a hostile file
        cancelled=cancelled,
        postponed=postponed,
        declined=declined,
        nothing_uploaded=not job.has_uploaded,
    )
    return worker_pb2.JobEvent(failed=failed)


def _checked(job: Job, payload: bytes | dict[str, Any]) -> tuple[Payload, Canvas]:
    try:
        fields = payloads.parse(payload) if isinstance(payload, bytes) else payload
        request = payloads.check(job.spec.task_type, fields, job.id)
        return request, hints.prepared(request) if isinstance(request, Generation) else Canvas()
    except (InvalidArgument, pictures.Damaged) as error:
        raise JobError(str(error)) from None


async def _encoded(images: list[Image.Image], provenance: Provenance, infotexts: Sequence[str] = ()) -> list[bytes]:
    """Each picture as a PNG file; the first ones have these texts."""
    texts = chain(infotexts, repeat(""))
    makings = await asyncio.to_thread(lambda: [provenance.of(index) for index in range(len(images))])
    return await asyncio.gather(
        *(
            asyncio.to_thread(results.png, image, making, text)
            for image, making, text in zip(images, makings, texts, strict=False)
        )
    )
