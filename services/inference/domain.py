"""The users' side of the jobs: who may do what with which job, its endpoint, its models, its payload."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

from services.common.blobs import BlobNotFound, Blobs, BlobTooLarge
from services.common.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from services.common.paging import KeyNames, make_key, parse_key, parse_limit
from services.common.times import time_text
from services.inference.payload import MAX_BYTES, CheckedPayload, check_json, check_payload
from services.inference.peers import Endpoint, Model, Peers
from services.inference.rows import ASYNC, REAL_TIME, Job, now
from services.inference.signals import JOB_ENDED, Signals, wait
from services.inference.store import JobStore

SIMPLE_TASKS = ["txt2img", "img2img"]
EXTRA_TASKS = ["extra-single-image", "extra-batch-images", "rembg"]
_KEY_NAMES = KeyNames("InferenceJobId", "createTime")
_MAX_IN_ROW_BYTES = 32 * 1024
_MAX_ON_LOOP_BYTES = 64 * 1024  # larger payloads are parsed in a thread
_SWEEP_SECONDS = 7.0
# The order in which a worker loads (contract 10.2); JSON objects arrive in none.
_MODEL_TYPES = ["Stable-diffusion", "hypernetworks", "Lora", "ControlNet", "embeddings", "VAE"]
_PSEUDO_VAES = ("Automatic", "None")


@dataclass(frozen=True)
class User:
    """Who asks. An anonymous one is the WebUI client that names nobody (contract 0.15)."""

    name: str
    roles: list[str]
    sees_everything: bool
    is_anonymous: bool = False


@dataclass(frozen=True)
class Draft:
    """A job as asked for. `models` maps checkpoint types to lists of file names."""

    task_type: str
    inference_type: str
    models: dict[str, Any]
    payload_string: str | None
    endpoint_name: str


class Inference:
    """Inference jobs as their users see them."""

    def __init__(
        self,
        store: JobStore,
        blobs: Blobs,
        peers: Peers,
        signals: Signals,
        in_background: Callable[[Any], None],
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._peers = peers
        self._signals = signals
        self._in_background = in_background

    async def check_payload_string(self, payload_string: str) -> None:
        """Refuses what is no JSON, before anything else is looked at.

        Raises:
            InvalidArgument.
        """
        await _off_loop(len(payload_string), check_json, payload_string)

    async def create_job(self, draft: Draft, user: User) -> Job:
        """Stores a job; one with a payload is started at once, and a Real-time one comes back when it has ended.

        Raises:
            InvalidArgument: the task, a model or the payload is wrong.
            FailedPrecondition: no endpoint is usable, or the Real-time job failed.
        """
        submit_time = now()
        if draft.task_type not in SIMPLE_TASKS + EXTRA_TASKS:
            raise InvalidArgument(f"task type {draft.task_type} should be in {EXTRA_TASKS} or {SIMPLE_TASKS}")
        endpoint = await self._choose_endpoint(draft, user)
        models = await self._find_models(draft.models, user) if draft.task_type in SIMPLE_TASKS else []
        job = Job(
            id=uuid4(),
            owner=user.name,
            task_type=draft.task_type,
            inference_type=draft.inference_type,
            endpoint_id=endpoint.id,
            endpoint_name=endpoint.name,
            instance_type=endpoint.instance_type,
            models=[model.as_dict() for model in models],
            base_model_key=next((model.cache_key for model in models if model.type == "Stable-diffusion"), ""),
        )
        if draft.payload_string is None:
            job.input_url = self._blobs.presign_put(job.input_key)
            await self._store.add(job)
            return job
        frozen = await self._freeze(job, draft.payload_string, submit_time)
        content = draft.payload_string.encode()
        if len(content) <= _MAX_IN_ROW_BYTES:
            job.payload_string = draft.payload_string
        else:
            await self._blobs.put(job.input_key, content)

        async def add() -> Job:
            job.queue(**frozen)
            await self._store.add(job)
            return job

        return await self._run(job, add)

    async def start_job(self, job_id: str, user: User) -> Job:
        """Checks and freezes the payload and queues the job; a Real-time one comes back when it has ended.

        Raises:
            InvalidArgument: the id is unknown or the payload wrong. PermissionDenied. FailedPrecondition: there is no
            payload, the job is under way, or the Real-time job failed.
        """
        submit_time = now()
        found = await self._find(job_id)
        if found is None:
            raise InvalidArgument(f"InferenceJobId {job_id} not found")
        job = found
        _check_owner(job, user)
        if job.status == "inprogress":
            raise FailedPrecondition(f"inference {job.id} is under way already")
        content = job.payload_string if job.payload_string is not None else await self._fetch_payload(job)
        frozen = await self._freeze(job, content, submit_time)
        old_results = job.result_prefix if job.result_lease else None

        async def queue() -> Job:
            queued = await self._store.queue(job.id, **frozen)
            if queued is None:
                raise InvalidArgument(f"InferenceJobId {job_id} not found")
            if old_results is not None:
                self._in_background(self._remove(old_results))
            return queued

        return await self._run(job, queue)

    async def get_job(self, job_id: str, user: User) -> Job:
        """One job.

        Raises:
            NotFound, PermissionDenied.
        """
        job = await self._find(job_id)
        if job is None:
            raise NotFound(f"inference with id {job_id} not found")
        if not user.is_anonymous:
            _check_owner(job, user)
        return job

    async def list_jobs(
        self, task_type: str, username: str, limit: str, start_key: str, user: User
    ) -> tuple[list[Job], str | None]:
        """A page of the jobs that the user may see, newest first, and the key of the next page.

        Raises:
            InvalidArgument: the username is unknown, the limit no number, or the key malformed.
        """
        if username and await self._peers.find_roles(username) is None:
            raise InvalidArgument(f'user: "{username}" not exist')
        size, after = parse_limit(limit), parse_key(_KEY_NAMES, start_key)
        sees_everything = user.sees_everything or user.is_anonymous
        if (username and not sees_everything and username != user.name) or "\0" in task_type:
            return [], None
        owners = [username] if username else None if sees_everything else [user.name]
        jobs = await self._store.page(task_type or "txt2img", owners, size + 1, after)
        last = jobs[size - 1] if len(jobs) > size else None
        return jobs[:size], make_key(_KEY_NAMES, last.id, last.create_time, taskType=last.task_type) if last else None

    async def delete_jobs(self, job_ids: list[str], user: User) -> None:
        """Cancels and deletes jobs with their input and results; unknown ids are skipped.

        Raises:
            PermissionDenied: one of them is somebody else's; none is deleted then.
        """
        for job in [await self._find(job_id) for job_id in job_ids]:
            if job is not None and not user.is_anonymous:
                _check_owner(job, user)
        known = [parsed for job_id in job_ids if (parsed := _parse_id(job_id)) is not None]
        jobs = await self._store.cancel(known, "the job was deleted by its owner")
        for job in jobs:
            await self._blobs.delete_prefix(f"out/{job.id}/")
            await self._blobs.delete_prefix(f"frozen/{job.id}/")
            for key in (job.input_key, job.output_key):
                if key is not None:
                    await self._blobs.delete(key)
        await self._store.remove([job.id for job in jobs])

    # --- what is shown of a job ---

    def input_location(self, job: Job) -> str:
        """Where the payload is or will be, `s3://…`."""
        return self._blobs.url(job.input_key)

    def output_location(self, job: Job) -> str | None:
        """Where the raw answer of an Async job is or will be, `s3://…`."""
        return self._blobs.url(job.output_key) if job.output_key else None

    def params(self, job: Job) -> dict[str, Any]:
        """The `params` of contract 6.1; `timings` of a finished job are our own."""
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
            "timings": _timings(job) if job.is_ended else None,
        }
        return {name: value for name, value in params.items() if value is not None}

    def result_urls(self, job: Job) -> tuple[list[str], list[str]]:
        """Fresh GET URLs of the images and of the result's description, valid for an hour."""
        images = [self._blobs.presign_get(job.result_prefix + name) for name in job.image_names or []]
        return images, [self._blobs.presign_get(job.result_prefix + job.param_name)]

    # --- inside ---

    async def _find(self, job_id: str) -> Job | None:
        parsed = _parse_id(job_id)
        return None if parsed is None else await self._store.get(parsed)

    async def _choose_endpoint(self, draft: Draft, user: User) -> Endpoint:
        found = await self._peers.find_endpoints(draft.inference_type, user.name, user.roles, draft.endpoint_name)
        if draft.endpoint_name:
            if not found:
                raise InvalidArgument(f"sagemaker endpoint with name {draft.endpoint_name} is not found")
            if found[0].status != "InService":
                raise FailedPrecondition(f"sagemaker endpoint is not ready with status: {found[0].status}")
        if draft.inference_type not in {ASYNC, REAL_TIME} or not found:
            raise FailedPrecondition(f'no available {draft.inference_type} endpoints for user "{user.name}"')
        return random.choice(found)  # noqa: S311 - load, not secrets

    async def _find_models(self, models: dict[str, Any], user: User) -> list[Model]:
        names = []
        for kind, files in sorted(models.items(), key=_loading_order):
            if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
                raise InvalidArgument(f"models: {kind} is not a list of file names")
            names += [(kind, name) for name in files]
        real = [(kind, name) for kind, name in names if kind != "VAE" or name not in _PSEUDO_VAES]
        found: list[Model] = []
        if real:
            found, missing = await self._peers.resolve_checkpoints(real, user.name, user.roles, user.sees_everything)
            if missing:
                texts = (f"checkpoint with name {name}, type {kind} is not found" for kind, name in missing)
                raise InvalidArgument(" ".join(texts))
        resolved = {(model.type, model.name): model for model in found}
        return [resolved.get((kind, name)) or _pseudo_vae(name) for kind, name in names]

    async def _fetch_payload(self, job: Job) -> bytes:
        try:
            content = await self._blobs.get(job.input_key, max_bytes=MAX_BYTES)
        except BlobTooLarge as error:
            raise InvalidArgument(
                f"the payload has {error.size_bytes} bytes; at most {MAX_BYTES} are possible"
            ) from None
        except BlobNotFound:
            raise FailedPrecondition(
                f"the payload of inference {job.id} was never uploaded: PUT it to api_params_s3_upload_url first"
            ) from None
        if not content:
            raise InvalidArgument("the payload is empty")
        return content

    async def _freeze(self, job: Job, content: bytes | str, submit_time: datetime) -> dict[str, Any]:
        """Checks a payload and keeps it where no client can change it; answers the arguments of `Job.queue`."""
        fetched = now()
        checked: CheckedPayload = await _off_loop(len(content), check_payload, content, job.task_type, str(job.id))
        if not job.base_model_key and job.task_type in SIMPLE_TASKS:
            raise InvalidArgument("models names no checkpoint of type Stable-diffusion")
        in_row = len(checked.encoded) <= _MAX_IN_ROW_BYTES
        if not in_row:
            await self._blobs.put(f"frozen/{job.id}/{checked.sha256}.json", checked.encoded)
        return {
            "payload": checked.fields if in_row else None,
            "payload_sha256": checked.sha256,
            "num_images": checked.num_images,
            "cost_seconds": checked.cost_seconds,
            "submit_time": submit_time,
            "output_id": uuid4() if job.inference_type == ASYNC else None,
            "timings": {"payload_seconds": (fetched - submit_time).total_seconds()},
        }

    async def _run(self, job: Job, queue: Callable[[], Any]) -> Job:
        """Queues the job; for a Real-time one waits for the end. Who stops waiting does not stop the job."""
        if job.inference_type != REAL_TIME:
            queued: Job = await queue()
            return queued
        with self._signals.subscribed((JOB_ENDED, str(job.id))) as ended:
            current: Job | None = await queue()
            while current is not None and not current.is_ended:
                await wait(ended, _SWEEP_SECONDS)
                current = await self._store.get(job.id)
        if current is None:
            raise FailedPrecondition(f"inference {job.id} was deleted")
        if current.failure is not None:
            raise FailedPrecondition(current.failure)
        return current

    async def _remove(self, prefix: str) -> None:
        await self._blobs.delete_prefix(prefix)


async def _off_loop(size: int, check: Callable[..., Any], *arguments: Any) -> Any:
    """Runs a check of a small text here, of a large one in a thread."""
    return check(*arguments) if size <= _MAX_ON_LOOP_BYTES else await asyncio.to_thread(check, *arguments)


def _check_owner(job: Job, user: User) -> None:
    if job.owner != user.name and not user.sees_everything:
        raise PermissionDenied(f"inference {job.id} belongs to another user than {user.name}")


def _loading_order(item: tuple[str, Any]) -> tuple[int, str]:
    kind = item[0]
    return _MODEL_TYPES.index(kind) if kind in _MODEL_TYPES else len(_MODEL_TYPES), kind


def _pseudo_vae(name: str) -> Model:
    """The VAE that is part of the base checkpoint, as the original prints it (`s3` is the text None)."""
    return Model(type="VAE", name=name, id="VAE", all_names=[name], s3_location="None")


def _timings(job: Job) -> dict[str, Any]:
    times = {
        "submit_time": job.submit_time,
        "claim_time": job.claim_time,
        "start_time": job.start_time,
        "complete_time": job.complete_time,
    }
    return {name: time_text(time) for name, time in times.items() if time is not None} | (job.timings or {})


def _parse_id(job_id: str) -> UUID | None:
    try:
        parsed = UUID(job_id)
    except ValueError:
        return None
    return parsed if str(parsed) == job_id.lower() else None
