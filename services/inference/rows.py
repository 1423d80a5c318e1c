"""The rows of the inference service and their states.

A job is `created` until it is started, then `inprogress`: queued while it has no lease, held by a worker while it has
one. It ends as `succeed` or `failed`, and may be started again from there. CHECK constraints in the migration say the
same, so that no statement can leave a job between states.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from sqlalchemy import DateTime
from sqlalchemy.dialects.postgresql import JSONB
from sqlmodel import Field, SQLModel

from services.common.errors import FailedPrecondition

MAX_LOST = 3
WRITABLE_SECONDS = 24 * 3600  # so long the URLs live by which workers write; clients' end sooner
REAL_TIME = "Real-time"
ASYNC = "Async"
_TIME = DateTime(timezone=True)
_JSON = JSONB(none_as_null=True)


def now() -> datetime:
    """The time of this process, with its zone."""
    return datetime.now(UTC)


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

    # What was frozen at the start: in the row, or under frozen_key with its SHA-256.
    payload: dict[str, Any] | None = Field(default=None, sa_type=_JSON)
    payload_sha256: str | None = None
    num_images: int = 0
    output_id: UUID | None = None
    submit_time: datetime | None = Field(default=None, sa_type=_TIME)
    priority_class: int = 1
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

    result_lease: UUID | None = None
    image_names: list[str] | None = Field(default=None, sa_type=_JSON)
    failure: str | None = None
    is_cancelled: bool = False
    complete_time: datetime | None = Field(default=None, sa_type=_TIME)
    timings: dict[str, float] | None = Field(default=None, sa_type=_JSON)

    @property
    def is_ended(self) -> bool:
        """Whether nothing more happens to the job unless it is started again."""
        return self.status in {"succeed", "failed"}

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
        """Where a large checked payload is kept, by content; no client gets a URL of it."""
        return f"frozen/{self.id}/{self.payload_sha256}.json"

    @property
    def output_key(self) -> str | None:
        """Where the raw answer of an Async job is written."""
        return f"sagemaker_output/{self.output_id}.out" if self.output_id else None

    @property
    def result_prefix(self) -> str:
        """The folder of the results that count; before there are any, the folder above."""
        return f"out/{self.id}/result/{self.result_lease}/" if self.result_lease else f"out/{self.id}/result/"

    @property
    def param_name(self) -> str:
        """The name of the result's description."""
        return f"{self.id}_param.json"

    def lease_prefix(self, lease_id: UUID) -> str:
        """The folder that the holder of a lease writes to."""
        return f"out/{self.id}/result/{lease_id}/"

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
        """created, succeed, failed → inprogress, with a clean slate. The store gives the place in the queue.

        Raises:
            FailedPrecondition: the job is under way.
        """
        if self.status == "inprogress":
            raise FailedPrecondition(f"inference {self.id} is under way already")
        self.status = "inprogress"
        self.payload, self.payload_sha256, self.num_images = payload, payload_sha256, num_images
        self.cost_seconds, self.submit_time, self.output_id = cost_seconds, submit_time, output_id
        self.priority_class = 0 if self.inference_type == REAL_TIME else 1
        self.passed_over = self.num_claims = self.num_lost = 0
        self.start_time = self.claim_time = self.complete_time = None
        self.result_lease = self.image_names = self.failure = None
        self.is_cancelled = False
        self.timings = timings

    def start(self) -> None:
        """The worker that holds the lease has begun; told again after a reconnect, it changes nothing."""
        if not self.is_running:
            self.is_running = True
            self.start_time = now()

    def succeed(self, image_names: list[str], timings: dict[str, float]) -> None:
        """held → succeed: the results under the current lease are the job's."""
        self.status, self.result_lease, self.image_names = "succeed", self.lease_id, image_names
        self.timings = {**(self.timings or {}), **timings}
        self._end()

    def fail(self, reason: str) -> None:
        """queued or held → failed, with a sentence for the owner."""
        self.status, self.failure = "failed", reason
        self._end()

    def cancel(self, reason: str) -> None:
        """created, queued or held → failed, because somebody wants it so.

        Raises:
            FailedPrecondition: the job has ended already.
        """
        if self.is_ended:
            raise FailedPrecondition(f"inference {self.id} has ended already: its status is {self.status}")
        self.is_cancelled = True
        self.fail(reason)

    def lose(self) -> None:
        """held → queued, because the worker was lost; the third worker lost while running it fails the job."""
        self.num_lost += self.is_running
        if self.num_lost >= MAX_LOST:
            self.fail(f"the worker was lost while running this job, {self.num_lost} times in a row")
        self._release()

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


class Leftover(SQLModel, table=True):
    """Objects that nobody may see any more. They are removed at `due_time`, and for good at `final_time`."""

    prefix: str = Field(primary_key=True)
    due_time: datetime = Field(sa_type=_TIME)
    final_time: datetime = Field(sa_type=_TIME)


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
