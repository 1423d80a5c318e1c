"""The rows of the inference service and their states.

states.py says what leads from which state to which: each method here refuses what is not in its table, and CHECK
constraints in the migrations see to it that no statement leaves a job between states.
"""

from __future__ import annotations

from collections.abc import Set
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ARRAY, DateTime, SmallInteger, Text
from sqlalchemy.dialects.postgresql import JSONB
from sqlmodel import Field, SQLModel

from services.common.errors import FailedPrecondition
from services.inference.states import State, allows

STATUSES = ("created", "inprogress", "succeed", "failed")
MAX_LOST = 3
LAST_ATTEMPT = MAX_LOST - 1  # as so often lost, a job is run alone: nobody else's fault may fail it
REAL_TIME = "Real-time"
ASYNC = "Async"
PENDING, DELIVERED, DEAD = "pending", "delivered", "dead"  # of webhooks
_TIME = DateTime(timezone=True)
_JSON = JSONB(none_as_null=True)
_NAMES = ARRAY(Text)


def now() -> datetime:
    """The time of this process, with its zone."""
    return datetime.now(UTC)


def lease_prefix(job_id: UUID, lease_id: UUID) -> str:
    """The folder that the holder of a lease of a job writes to."""
    return f"out/{job_id}/result/{lease_id}/"


class Job(SQLModel, table=True):
    """An inference job. Costs and virtual times are estimated GPU-seconds; `failure` is shown as sagemakerRaw."""

    id: UUID = Field(primary_key=True)
    owner: str
    task_type: str
    inference_type: str
    status: str = "created"
    endpoint_id: UUID
    endpoint_name: str
    instance_type: str
    models: list[dict[str, Any]] = Field(sa_type=_JSON)
    input_url: str | None = None
    payload_string: str | None = None
    create_time: datetime = Field(default_factory=now, sa_type=_TIME)
    webhook: str | None = None
    webhook_secret: str | None = None

    # What was frozen at the start: in the row, or under frozen_key with its SHA-256.
    payload: dict[str, Any] | None = Field(default=None, sa_type=_JSON)
    payload_sha256: str | None = None
    num_images: int = 0
    output_id: UUID | None = None
    submit_time: datetime | None = Field(default=None, sa_type=_TIME)
    priority_class: int = Field(default=1, sa_type=SmallInteger)
    priority: int = Field(default=0, sa_type=SmallInteger)
    deadline_seconds: float | None = None
    deadline_time: datetime | None = Field(default=None, sa_type=_TIME)
    cost_seconds: float = 0.0
    virtual_start: float | None = None
    base_model_key: str = ""
    passed_over: int = 0

    lease_id: UUID | None = None
    worker_id: str | None = None
    is_running: bool = False
    claim_time: datetime | None = Field(default=None, sa_type=_TIME)
    start_time: datetime | None = Field(default=None, sa_type=_TIME)
    num_claims: int = 0
    num_lost: int = 0
    declined_by: list[str] = Field(default_factory=list, sa_type=_NAMES)
    postponed_since: datetime | None = Field(default=None, sa_type=_TIME)

    result_lease: UUID | None = None
    image_names: list[str] | None = Field(default=None, sa_type=_JSON)
    result_objects: list[dict[str, Any]] | None = Field(default=None, sa_type=_JSON)
    is_output_missing: bool = False
    failure: str | None = None
    is_cancelled: bool = False
    complete_time: datetime | None = Field(default=None, sa_type=_TIME)
    timings: dict[str, float] | None = Field(default=None, sa_type=_JSON)

    @property
    def state(self) -> State:
        """Where the job is in its life."""
        if self.status != "inprogress":
            return State(self.status)
        return State.QUEUED if self.lease_id is None else State.RUNNING if self.is_running else State.HELD

    @property
    def is_ended(self) -> bool:
        """Whether nothing more happens to the job unless it is started again."""
        return self.status in {"succeed", "failed"}

    @property
    def is_last_attempt(self) -> bool:
        """Whether the next worker that is lost while running the job fails it."""
        return self.num_lost >= LAST_ATTEMPT

    @property
    def prefixes(self) -> list[str]:
        """Where all objects of the job are."""
        folders = [f"{self.task_type}/infer_v2/{self.id}/", f"frozen/{self.id}/", f"out/{self.id}/"]
        return folders + ([self.output_key] if self.output_key else [])

    @property
    def input_key(self) -> str:
        """Where the client puts the payload."""
        return f"{self.task_type}/infer_v2/{self.id}/api_param.json"

    @property
    def frozen_key(self) -> str:
        """Where the checked payload is kept that is too large for the row."""
        return self.frozen_key_of(self.payload_sha256 or "")

    @property
    def output_key(self) -> str | None:
        """Where the raw answer of an Async job is written."""
        return f"sagemaker_output/{self.output_id}.out" if self.output_id else None

    @property
    def result_prefix(self) -> str:
        """The folder of the results that count; before there are any, the folder above."""
        return self.lease_prefix(self.result_lease) if self.result_lease else f"out/{self.id}/result/"

    @property
    def result_names(self) -> list[str]:
        """The names of the pictures that a worker must deliver (contract 9)."""
        if self.task_type in {"rembg", "extra-single-image"}:
            return ["image.png"]
        return [f"image_{number}.png" for number in range(self.num_images)]

    @property
    def param_name(self) -> str:
        """The name of the result's description."""
        return f"{self.id}_param.json"

    def frozen_key_of(self, payload_sha256: str) -> str:
        """Where a large checked payload would be kept, by content; no client gets a URL of it."""
        return f"frozen/{self.id}/{payload_sha256}.json"

    def lease_prefix(self, lease_id: UUID) -> str:
        """The folder that the holder of a lease writes to."""
        return lease_prefix(self.id, lease_id)

    def queue(
        self,
        payload: dict[str, Any] | None,
        payload_sha256: str | None,
        num_images: int,
        cost_seconds: float,
        submit_time: datetime,
        output_id: UUID | None,
        timings: dict[str, float],
    ) -> None:
        """Begins anew with a clean slate. The store gives the place in the queue, and the time of the deadline.

        Raises:
            FailedPrecondition: the job is under way.
        """
        self._check("queue")
        self.status = "inprogress"
        self.payload, self.payload_sha256, self.num_images = payload, payload_sha256, num_images
        self.cost_seconds, self.submit_time, self.output_id = cost_seconds, submit_time, output_id
        self.priority_class = 0 if self.inference_type == REAL_TIME else 1
        self.passed_over = self.num_claims = self.num_lost = 0
        self.declined_by = []
        self.start_time = self.claim_time = self.complete_time = self.postponed_since = None
        self.deadline_time = None
        self.result_lease = self.image_names = self.result_objects = self.failure = None
        self.is_cancelled = self.is_output_missing = False
        self.timings = timings

    def move(self, endpoint_id: UUID, endpoint_name: str, instance_type: str) -> None:
        """Waits at another endpoint. The store gives the place in its queue."""
        self._check("move")
        self.endpoint_id, self.endpoint_name, self.instance_type = endpoint_id, endpoint_name, instance_type

    def succeed(self, objects: list[dict[str, Any]], timings: dict[str, float]) -> None:
        """The results under the current lease, images and description with size and SHA-256, are the job's."""
        self._check("succeed")
        self.status, self.result_lease, self.result_objects = "succeed", self.lease_id, objects
        self.image_names = [found["name"] for found in objects if found["name"] != self.param_name]
        self.is_output_missing = self.output_id is not None
        self.timings = {**(self.timings or {}), **timings}
        self._end()

    def fail(self, reason: str) -> None:
        """Ends without a result, with a sentence for the owner."""
        self._check("fail")
        self._fail(reason)

    def cancel(self, reason: str) -> None:
        """Ends because somebody wants it so.

        Raises:
            FailedPrecondition: the job has ended already.
        """
        self._check("cancel")
        self.is_cancelled = True
        self._fail(reason)

    def lose(self) -> None:
        """Is queued again, because the worker was lost, by this job or another one; the third loss fails the job. On
        its last attempt it may still wait for its worker to run it alone: only one that runs is lost by its own fault.
        """
        self._check("lose")
        self.num_lost += self.is_running or not self.is_last_attempt
        if self.num_lost >= MAX_LOST:
            self._fail(f"the worker was lost while it had this job, {self.num_lost} times")
        self._release()

    def give_back(self) -> None:
        """Is queued again, because the worker stops by itself, which no job made it do: it is no attempt."""
        self._check("give_back")
        self._release()

    def decline(self, reason: str, workers: Set[str]) -> None:
        """Is queued again for the endpoint's other workers, because this one's disk has no room for it; fails when all
        of `workers`, the endpoint's, have said so. It is no attempt that was lost."""
        self._check("decline")
        assert self.worker_id is not None
        self.declined_by = [*self.declined_by, self.worker_id]
        if workers <= set(self.declined_by):
            self._fail(reason)
        self._release()

    def postpone(self, reason: str, time: datetime, max_seconds: float) -> None:
        """Is queued again, because its worker could not reach the object store; fails when that has gone on for so long
        since the first time after it last ran. It is no attempt that was lost."""
        self._check("postpone")
        self.postponed_since = self.postponed_since or time
        if (time - self.postponed_since).total_seconds() >= max_seconds:
            self._fail(f"the object store could not be reached for {max_seconds:g} s; the last attempt: {reason}")
        self._release()

    @property
    def running_seconds(self) -> float:
        """How long the worker that has the job runs it. Two clocks tell, so it may be a little wrong."""
        return max(0.0, (now() - self.start_time).total_seconds()) if self.is_running and self.start_time else 0.0

    def _check(self, change: str) -> None:
        """Refuses a change that is not possible in this state."""
        if allows(change, self.state):
            return
        if change == "queue":
            raise FailedPrecondition(f"inference {self.id} is under way already")
        if self.is_ended:
            raise FailedPrecondition(f"inference {self.id} has ended already: its status is {self.status}")
        raise FailedPrecondition(f"inference {self.id} is {self.state}, which does not allow to {change} it")

    def _fail(self, reason: str) -> None:
        self.status, self.failure = "failed", reason
        self._end()

    def _end(self) -> None:
        self.complete_time = now()
        self._release()

    def _release(self) -> None:
        self.lease_id = self.worker_id = None
        self.is_running = False


class Worker(SQLModel, table=True):
    """A worker and its current stream. Its leases live as long as `last_seen` is recent."""

    endpoint_id: UUID = Field(primary_key=True)
    worker_id: str = Field(primary_key=True)
    stream_id: UUID
    device: str
    version: str
    last_seen: datetime = Field(sa_type=_TIME)


class UserClock(SQLModel, table=True):
    """How much GPU time of an endpoint a user has been given, in virtual seconds; user '' is the queue's own clock."""

    __tablename__ = "user_clock"

    endpoint_id: UUID = Field(primary_key=True)
    username: str = Field(primary_key=True)
    virtual_time: float


class RetiredEndpoint(SQLModel, table=True):
    """An endpoint that went away: jobs that still come to its queue are moved or failed."""

    __tablename__ = "retired_endpoint"

    endpoint_id: UUID = Field(primary_key=True)
    reason: str


class PinnedModels(SQLModel, table=True):
    """The checkpoints that an endpoint's workers keep ready, by name; there is no row where there are none."""

    __tablename__ = "pinned_models"

    endpoint_id: UUID = Field(primary_key=True)
    names: list[str] = Field(sa_type=_JSON)


class Webhook(SQLModel, table=True):
    """The webhook of a job that has ended. `since_time` is its first attempt; `due_time` is the next one."""

    job_id: UUID = Field(primary_key=True)
    owner: str
    url: str
    message_id: UUID
    state: str
    create_time: datetime = Field(sa_type=_TIME)
    since_time: datetime = Field(sa_type=_TIME)
    due_time: datetime = Field(sa_type=_TIME)
    num_attempts: int
    last_error: str | None = None
    end_time: datetime | None = Field(default=None, sa_type=_TIME)

    def resend(self, time: datetime) -> None:
        """delivered, dead → pending, from the beginning, but for the message's id: a receiver may know it."""
        self.state, self.num_attempts, self.last_error, self.end_time = PENDING, 0, None, None
        self.since_time = self.due_time = time


class JobProgress(SQLModel, table=True):
    """How far a job is that is watched on another replica than its worker's."""

    __tablename__ = "job_progress"

    job_id: UUID = Field(primary_key=True)
    lease_id: UUID
    step: int
    num_steps: int
    preview: bytes
    num_previews: int
    update_time: datetime = Field(sa_type=_TIME)


class Submission(SQLModel, table=True):
    """A creation under an `Idempotency-Key`: who sends the same again within a day gets the same job."""

    owner: str = Field(primary_key=True)
    key: str = Field(primary_key=True)
    body_sha256: str
    job_id: UUID
    create_time: datetime = Field(default_factory=now, sa_type=_TIME)


class Usage(SQLModel, table=True):
    """The GPU-seconds of a user's jobs that ended within a minute. It outlives the jobs, by an hour."""

    owner: str = Field(primary_key=True)
    minute: datetime = Field(primary_key=True, sa_type=_TIME)
    gpu_seconds: float
