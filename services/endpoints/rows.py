"""The rows of the endpoints service: endpoints, the places of their workers, tasks, and what happened to endpoints."""

from __future__ import annotations

from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import ARRAY, BigInteger, DateTime, Text
from sqlmodel import Field, SQLModel

from services.endpoints.scaling import Scale

ASYNC, REAL_TIME = "Async", "Real-time"
# What an endpoint's status may be. An event has the status that an endpoint came to, or one of the other words.
CREATING, IN_SERVICE, UPDATING, FAILED, DELETING = "Creating", "InService", "Updating", "Failed", "Deleting"
DRAINING = "Draining"  # not a word of the original: no workers and no new jobs, until somebody ends that
CREATED, UPDATED, SCALED_OUT, SCALED_IN = "Created", "Updated", "ScaledOut", "ScaledIn"
WORKER_STARTED, WORKER_ENDED, WORKER_WAITS = "WorkerStarted", "WorkerEnded", "WorkerWaits"
_TIME = DateTime(timezone=True)
# What of an endpoint nobody asked for, and what its name in the audit says.
_OBSERVED = {
    "id",
    "name",
    "num_live",
    "num_workers",
    "need_since",
    "surplus_since",
    "surplus_peak",
    "start_time",
    "end_time",
    "is_retired",
    "are_pins_told",
}


class Endpoint(SQLModel, table=True):
    """A pool. Counts are of workers: `num_initial`, `num_min` and `num_max` are wishes, `num_live` is what was seen.

    `num_workers` is what the control loop has decided, and `need_since` to `surplus_peak` why it may decide otherwise
    soon (scaling.Scale). `is_retired` says that the queue was told that the endpoint takes no more jobs, and
    `are_pins_told` that it was told which checkpoints are `pinned`.
    """

    __tablename__ = "endpoints"

    id: str = Field(primary_key=True)
    name: str
    type: str
    status: str = CREATING
    instance_type: str
    autoscaling: bool
    num_initial: int
    num_min: int
    num_max: int
    num_live: int = 0
    num_workers: int
    need_since: datetime | None = Field(default=None, sa_type=_TIME)
    surplus_since: datetime | None = Field(default=None, sa_type=_TIME)
    surplus_peak: int = 0
    owners: list[str] = Field(sa_type=ARRAY(Text))
    creator: str
    custom_extensions: str = ""
    custom_docker_image_uri: str = ""
    start_time: datetime = Field(sa_type=_TIME)
    end_time: datetime | None = Field(default=None, sa_type=_TIME)
    error: str | None = None
    is_retired: bool = False
    pinned: list[str] = Field(default_factory=list, sa_type=ARRAY(Text))
    are_pins_told: bool = True

    def facts(self) -> dict[str, Any]:
        """What the audit may know: what was asked for, and what became of it; not what is merely observed."""
        return self.model_dump(exclude=_OBSERVED)

    @property
    def scale(self) -> Scale:
        """What was decided about the number of workers."""
        return Scale(self.num_workers, self.need_since, self.surplus_since, self.surplus_peak)


class Worker(SQLModel, table=True):
    """A place for one worker process of an endpoint, and the process that was last started in it.

    `num_launches` fences: only who raised it from the number they read may let their process go. `num_failures` counts
    starts in a row that did not reach the queue, `was_live` says whether the present one did.
    """

    __tablename__ = "workers"

    endpoint_id: str = Field(primary_key=True)
    slot: int = Field(primary_key=True)
    num_launches: int = 0
    num_failures: int = 0
    was_live: bool = False
    pid: int | None = None
    start_time: str | None = None
    gpu: str | None = None

    @property
    def key(self) -> str:
        """The name of the place, whichever process is in it."""
        return f"{self.endpoint_id}-{self.slot}"

    @property
    def worker_id(self) -> str:
        """The name by which the queue knows the process; another launch has another one."""
        return f"{self.key}-{self.num_launches}"


class TaskState(StrEnum):
    """Where a task is in its life. It waits again between two attempts."""

    WAITING = "waiting"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"


OPEN = (TaskState.WAITING, TaskState.RUNNING)  # of a task that has not ended


class Task(SQLModel, table=True):
    """A command that runs to its end, and the process that was last started for it, where that is one of a machine.

    `service` asked for it. `num_attempts` fences as a worker's `num_launches` does, `num_failed` of them count against
    `max_attempts`. `is_cleared` says that its secret and whatever else was made for it are gone.
    """

    __tablename__ = "tasks"

    id: str = Field(primary_key=True)
    kind: str
    service: str
    instance_type: str
    max_attempts: int
    deadline_seconds: int | None = Field(default=None, sa_type=BigInteger)
    state: str = TaskState.WAITING
    reason: str = ""
    stop_requested: bool = False
    num_attempts: int = 0
    num_failed: int = 0
    creation_time: datetime = Field(sa_type=_TIME)
    begin_time: datetime | None = Field(default=None, sa_type=_TIME)
    end_time: datetime | None = Field(default=None, sa_type=_TIME)
    is_cleared: bool = False
    pid: int | None = None
    start_time: str | None = None
    gpu: str | None = None

    @property
    def key(self) -> str:
        """The name under which its processes are held, one after the other."""
        return self.id

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state not in OPEN

    @property
    def deadline(self) -> datetime | None:
        """When it has to have ended; None where it may take as long as it likes, or has not begun."""
        if self.begin_time is None or self.deadline_seconds is None:
            return None
        return self.begin_time + timedelta(seconds=self.deadline_seconds)


class Event(SQLModel, table=True):
    """Something that happened to an endpoint."""

    __tablename__ = "events"

    id: UUID = Field(primary_key=True)
    endpoint_id: str
    time: datetime = Field(sa_type=_TIME)
    type: str
    message: str
