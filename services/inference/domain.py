"""The users' side of the jobs: who may do what with which job, its endpoint, its models, its payload."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

from services.common.blobs import Blobs
from services.common.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from services.common.ids import parse_id
from services.common.notifications import Notifications
from services.common.paging import KeyNames, make_key, parse_key, parse_limit
from services.common.payloads.models import BASE
from services.common.tasks import heard
from services.common.times import read_time
from services.common.viewer import Viewer
from services.inference.channels import JOB_ENDED
from services.inference.peers import Peers
from services.inference.rows import REAL_TIME, STATUSES, Job, Submission, now
from services.inference.store import JobFilter, JobStore
from services.inference.submitting.choices import EXTRA_TASKS, SIMPLE_TASKS, Choices, Draft
from services.inference.submitting.freezing import Freezer
from services.inference.submitting.priorities import Priorities
from services.inference.submitting.submissions import SubmittedBefore
from services.inference.upkeep.cleaning import Cleaner
from services.inference.webhooks.domain import check_webhook

_KEY_NAMES = KeyNames("InferenceJobId", "createTime")
_SWEEP_SECONDS = 7.0
_REMOVE_SECONDS = 20.0  # of a deletion, for which a client waits
_MAX_PAGE_BYTES = 4 * 2**20  # about; an answer has a bound (services/common/interceptor.py)
_READ_AT_ONCE = 16  # of a page's jobs, each of which may be a megabyte
_ITEM_BYTES = 1024  # of a picture's or a model's description


@dataclass(frozen=True)
class Wanted:
    """Which jobs a list is to show, as the query says it. What is empty filters nothing; the type has a default."""

    task_type: str = ""
    username: str = ""
    status: str = ""
    endpoint_name: str = ""
    start_time: str = ""
    end_time: str = ""
    limit: str = ""
    start_key: str = ""


class Inference:
    """Inference jobs as their users see them. Once `stopping` is set nobody waits for a Real-time job any more."""

    def __init__(
        self,
        store: JobStore,
        blobs: Blobs,
        peers: Peers,
        notifications: Notifications,
        cleaner: Cleaner,
        priorities: Priorities,
        stopping: asyncio.Event,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._peers = peers
        self._notifications = notifications
        self._cleaner = cleaner
        self._priorities = priorities
        self._stopping = stopping
        self._choices = Choices(peers)
        self._freezer = Freezer(blobs)

    async def check_payload_string(self, payload_string: str) -> None:
        """Refuses what is no JSON, before anything else is looked at.

        Raises:
            InvalidArgument.
        """
        await self._freezer.check_json(payload_string)

    async def create_job(self, draft: Draft, user: Viewer) -> Job:
        """Stores a job; one with a payload is started at once, and a Real-time one comes back when it has ended.

        With an idempotency key that the user sent before, within a day, it is the job of that time.

        Raises:
            InvalidArgument: the task, a model or the payload is wrong. PermissionDenied: the priority is not for this
            user. FailedPrecondition: no endpoint is usable, or the Real-time job failed. AlreadyExists: the key came
            with another body before. ResourceExhausted: the user's quota is used up.
        """
        submit_time = now()
        if draft.task_type not in SIMPLE_TASKS + EXTRA_TASKS:
            raise InvalidArgument(f"task type {draft.task_type} should be in {EXTRA_TASKS} or {SIMPLE_TASKS}")
        check_webhook(draft.webhook, draft.webhook_secret)
        self._priorities.check(draft.priority, user.name, user.roles)
        if earlier := await self._find_earlier(draft, user):
            return earlier
        job = await self._new_job(draft, user)
        submission = _submission(draft, user, job)
        try:
            if draft.payload_string is None:
                job.input_url = self._blobs.presign_put(job.input_key)
                return await self._add(job, submission, [])
            expected = await self._freeze_inline(job, draft.payload_string, submit_time)
            return await self._run(job, lambda: self._add(job, submission, expected))
        except SubmittedBefore:
            if earlier := await self._find_earlier(draft, user):
                return earlier
            raise

    async def _find_earlier(self, draft: Draft, user: Viewer) -> Job | None:
        """The job that the user created under the same key, as far on as the first request would be now.

        Raises:
            AlreadyExists: the key came with another body. FailedPrecondition: the Real-time job failed.
        """
        found = await self._store.find_submission(user.name, draft.idempotency_key) if draft.idempotency_key else None
        if found is None:
            return None
        body_sha256, job = found
        if body_sha256 != draft.body_sha256:
            raise AlreadyExists(
                f'Idempotency-Key "{draft.idempotency_key}" came with another body before; '
                "a new request needs a new key"
            )
        if draft.payload_string is None:
            job.input_url = self._blobs.presign_put(job.input_key)
            return job

        async def current() -> Job:
            return job

        return await self._run(job, current)

    async def _freeze_inline(self, job: Job, payload_string: str, submit_time: datetime) -> list[str]:
        """Freezes a payload that came with the job, which is to be queued; answers below which prefixes objects are
        expected to be a job's."""
        frozen = await self._freezer.freeze_inline(job, payload_string, submit_time)
        expected = job.prefixes if frozen.objects else []
        if expected:
            await self._cleaner.expect(expected)
            await self._freezer.put(frozen.objects)
        job.queue(**frozen.arguments)
        return expected

    async def _freeze(self, job: Job, submit_time: datetime) -> dict[str, Any]:
        """Freezes the payload of a job that is there already; answers the arguments of `Job.queue`. Its bytes are let
        go of here, as a Real-time job may take minutes."""
        content = job.payload_string if job.payload_string is not None else await self._freezer.fetch(job)
        frozen = await self._freezer.freeze(job, content, submit_time)
        await self._freezer.put(frozen.objects)
        return frozen.arguments

    async def _add(self, job: Job, submission: Submission | None, expected: list[str]) -> Job:
        """Adds a job whose objects, if it has any, were `expected` below these prefixes."""
        try:
            await self._store.add(job, submission, expected)
        except (ResourceExhausted, SubmittedBefore):
            if expected:
                await self._cleaner.discard(expected)
            raise
        return job

    async def _new_job(self, draft: Draft, user: Viewer) -> Job:
        endpoint = await self._choices.choose_endpoint(draft, user)
        models = await self._choices.find_models(draft.models_of_task, user)
        return Job(
            id=uuid4(),
            owner=user.name,
            task_type=draft.task_type,
            inference_type=draft.inference_type,
            endpoint_id=endpoint.id,
            endpoint_name=endpoint.name,
            instance_type=endpoint.instance_type,
            models=[model.as_dict() for model in models],
            webhook=draft.webhook or None,
            webhook_secret=draft.webhook_secret or None,
            base_model_key=next((model.cache_key for model in models if model.type == BASE), ""),
            priority=draft.priority,
            deadline_seconds=draft.deadline_seconds,
        )

    async def start_job(self, job_id: str, user: Viewer) -> Job:
        """Checks and freezes the payload and queues the job; a Real-time one comes back when it has ended. One that is
        under way already goes on as it was started: a client may repeat a start whose answer it did not get.

        Raises:
            InvalidArgument: the id is unknown or the payload wrong. PermissionDenied. FailedPrecondition: there is no
            payload, or the Real-time job failed. ResourceExhausted: the owner's quota is used up. Unavailable: the
            object store is away; nothing has changed.
        """
        submit_time = now()
        job = _known(job_id, await self._find(job_id))
        _check_owner(job, user)

        async def current() -> Job:
            return _known(job_id, await self._find(job_id))

        if job.status == "inprogress":
            return await self._run(job, current)
        arguments = await self._freeze(job, submit_time)

        async def queue() -> Job:
            try:
                return _known(job_id, await self._store.queue(job.id, **arguments))
            except FailedPrecondition:  # another start was quicker
                return await current()

        return await self._run(job, queue)

    async def get_job(self, job_id: str, user: Viewer) -> Job:
        """One job.

        Raises:
            NotFound, PermissionDenied.
        """
        job = await self._find(job_id)
        if job is None:
            raise NotFound(f"inference with id {job_id} not found")
        _check_owner(job, user)
        return job

    async def cancel_job(self, job_id: str, user: Viewer) -> Job:
        """Ends a job that has not ended: one that waits at once, one that runs within a step of its worker.

        Raises:
            NotFound, PermissionDenied. FailedPrecondition: it has ended already, other than by being cancelled.
        """
        job = await self._find(job_id)
        if job is not None:
            _check_owner(job, user)
            job = await self._store.cancel(job.id, f"the job was cancelled by {user.name}")
        if job is None:
            raise NotFound(f"inference with id {job_id} not found")
        return job

    async def list_jobs(self, wanted: Wanted, user: Viewer) -> tuple[list[Job], str | None]:
        """A page of the jobs that the user may see, newest first, and the key of the next page.

        Raises:
            InvalidArgument: the username or the status is unknown, the limit no number, a time none, or the key
            malformed.
        """
        if wanted.username:
            await self._peers.users.get_user(wanted.username)
        if wanted.status and wanted.status not in STATUSES:
            raise InvalidArgument(f'status "{wanted.status}" is not known; possible: {", ".join(STATUSES)}')
        size, after = parse_limit(wanted.limit), parse_key(_KEY_NAMES, wanted.start_key)
        since, until = _time("start_time", wanted.start_time), _time("end_time", wanted.end_time)
        if wanted.username and not user.sees_everything and wanted.username != user.name:
            return [], None
        owners = [wanted.username] if wanted.username else None if user.sees_everything else [user.name]
        task_type = wanted.task_type or SIMPLE_TASKS[0]
        kind = JobFilter(task_type, owners, wanted.status, wanted.endpoint_name, since, until)
        page, has_more = await self._page(kind, size, after)
        last = page[-1] if has_more else None
        return page, make_key(_KEY_NAMES, last.id, last.create_time, taskType=last.task_type) if last else None

    async def delete_jobs(self, job_ids: list[str], user: Viewer) -> None:
        """Cancels and deletes jobs with their input and results; unknown ids are skipped.

        Raises:
            PermissionDenied: one of them is somebody else's; none is deleted then.
        """
        for job in [await self._find(job_id) for job_id in job_ids]:
            if job is not None:
                _check_owner(job, user)
        known = [parsed for job_id in job_ids if (parsed := parse_id(job_id)) is not None]
        deleted = await self._store.delete(known)
        with suppress(TimeoutError):  # the cleaner goes on where this ends
            async with asyncio.timeout(_REMOVE_SECONDS):
                for job in deleted:
                    await self._cleaner.remove(job.prefixes)

    # --- inside ---

    async def _find(self, job_id: str) -> Job | None:
        parsed = parse_id(job_id)
        return None if parsed is None else await self._store.get(parsed)

    async def _page(self, kind: JobFilter, size: int, after: tuple[datetime, UUID] | None) -> tuple[list[Job], bool]:
        """As many jobs as a page has room for, one in any case, and whether there are more."""
        jobs: list[Job] = []
        num_bytes = 0
        while True:
            found = await self._store.page(kind, _READ_AT_ONCE, after)
            for job in found:
                num_items = 1 + len(job.image_names or []) + len(job.models)
                num_bytes += len((job.payload_string or "").encode()) + _ITEM_BYTES * num_items
                if len(jobs) == size or (jobs and num_bytes > _MAX_PAGE_BYTES):
                    return jobs, True
                jobs.append(job)
            if len(found) < _READ_AT_ONCE:
                return jobs, False
            after = found[-1].create_time, found[-1].id

    async def _run(self, job: Job, queue: Callable[[], Any]) -> Job:
        """Queues the job; for a Real-time one waits for the end. Who stops waiting does not stop the job.

        Raises:
            FailedPrecondition: the Real-time job failed, or was deleted. Unavailable: this process stops before that.
        """
        if job.inference_type != REAL_TIME:
            queued: Job = await queue()
            return queued
        with self._notifications.subscribed((JOB_ENDED, str(job.id))) as ended:
            current: Job | None = await queue()
            while current is not None and not current.is_ended:
                if self._stopping.is_set():
                    raise Unavailable(f"inference {job.id} goes on, but who waited for it stops: ask for it by its id")
                await heard(ended, _SWEEP_SECONDS)
                with suppress(Unavailable):  # the job goes on without the database, and whoever waits for it
                    current = await self._store.get(job.id)
        if current is None:
            raise FailedPrecondition(f"inference {job.id} was deleted")
        if current.failure is not None:
            raise FailedPrecondition(current.failure)
        return current


def _submission(draft: Draft, user: Viewer, job: Job) -> Submission | None:
    """What is remembered of a request that came with a key."""
    if not draft.idempotency_key:
        return None
    return Submission(owner=user.name, key=draft.idempotency_key, body_sha256=draft.body_sha256, job_id=job.id)


def _time(name: str, text: str) -> datetime | None:
    try:
        return read_time(text) if text else None
    except ValueError:
        raise InvalidArgument(f'{name} "{text}" is no time; 2026-01-31 or 2026-01-31 23:59:59 is possible') from None


def _known(job_id: str, found: Job | None) -> Job:
    if found is None:
        raise InvalidArgument(f"InferenceJobId {job_id} not found")
    return found


def _check_owner(job: Job, user: Viewer) -> None:
    if job.owner != user.name and not user.sees_everything:
        raise PermissionDenied(f"inference {job.id} belongs to another user than {user.name}")
