"""The rows of the training service: a training with its state, what was noted of it, its loss curve.

A training has begun when all is there that it needs: its checkpoint, its configuration. Before that nobody sees it.
It is Initial until its task was asked for, Starting until its trainer comes, then Downloading, Training and
Uploading as that says. It ends once: Completed, Failed or Stopped; after a stop the
trainer may tell of what it had saved before, and leaves. A trainer that is lost changes nothing: the next one
goes on from the last state. Completed is said when the checkpoint is Active, not before.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, DateTime
from sqlalchemy.dialects.postgresql import JSONB
from sqlmodel import Field, SQLModel

INITIAL, STARTING, COMPLETED, FAILED, STOPPED = "Initial", "Starting", "Completed", "Failed", "Stopped"
DOWNLOADING, TRAINING, UPLOADING = "Downloading", "Training", "Uploading"
PHASES = (DOWNLOADING, TRAINING, UPLOADING)
_TIME = DateTime(timezone=True)
_JSON = JSONB(none_as_null=True)


def now() -> datetime:
    """The time of this process, with its zone."""
    return datetime.now(UTC)


class Training(SQLModel, table=True):
    """A training. `params` are as they are shown, `config` has kohya's keys, checked.

    `base` is the model file (name, key, size_bytes, sha256, cache_key); `state` is what a later session goes on from,
    and `files` are the networks that were saved: each an object with name, sha256, size_bytes and epoch.
    """

    id: UUID = Field(primary_key=True)
    owner: str
    status: str = INITIAL
    is_begun: bool = False
    create_time: datetime = Field(default_factory=now, sa_type=_TIME)
    params: dict[str, Any] = Field(sa_type=_JSON)
    config: dict[str, Any] = Field(sa_type=_JSON)
    fm_type: str
    instance_type: str
    deadline_seconds: int | None = None
    base: dict[str, Any] = Field(sa_type=_JSON)
    dataset_prefix: str
    regularisation_prefix: str = ""

    # The trainer that has it, those that had it before, and up to which of its events all are kept.
    session: UUID | None = None
    earlier_sessions: list[str] = Field(default_factory=list, sa_type=_JSON)
    num_kept: int = Field(default=0, sa_type=BigInteger)
    state: dict[str, Any] | None = Field(default=None, sa_type=_JSON)
    files: list[dict[str, Any]] = Field(default_factory=list, sa_type=_JSON)
    progress: dict[str, Any] | None = Field(default=None, sa_type=_JSON)
    waits_for: str = ""

    outcome: str | None = None
    reason: str = ""
    end_time: datetime | None = Field(default=None, sa_type=_TIME)
    is_settled: bool = False

    @property
    def is_ended(self) -> bool:
        """Whether it is known how it ends."""
        return self.outcome is not None

    @property
    def is_leaving(self) -> bool:
        """Whether it was stopped, and its trainer may still tell of what it had saved before."""
        return self.outcome == STOPPED and self.session is not None and not self.is_settled

    @property
    def folder(self) -> str:
        """Where all its objects are."""
        return f"kohya/train/{self.id}/"

    @property
    def input_prefix(self) -> str:
        """Where its configuration is."""
        return f"{self.folder}input/"

    @property
    def output_prefix(self) -> str:
        """Where its results are."""
        return f"{self.folder}output/"

    @property
    def work_prefix(self) -> str:
        """Where its trainers upload to."""
        return f"{self.folder}work/"

    def session_prefix(self, session: UUID) -> str:
        """Where one of its trainers uploads to."""
        return f"{self.work_prefix}{session}/"

    @property
    def last_file(self) -> str:
        """The name of the network at its end."""
        return f"{self.config['output_name']}.safetensors"

    @property
    def networks(self) -> list[dict[str, Any]]:
        """What it saved, the last first."""
        return sorted(self.files, key=lambda file: (file["name"] != self.last_file, -file["epoch"], file["name"]))

    def take(self, session: UUID) -> None:
        """A trainer has it from now on; one that came before is not heard any more."""
        if session == self.session:
            return
        if self.session is not None:
            self.earlier_sessions = [*self.earlier_sessions, str(self.session)]
        self.session, self.num_kept = session, 0
        self.status, self.waits_for = STARTING, ""

    def was_left_by(self, session: UUID) -> bool:
        """Whether a trainer had it that another one has taken it from."""
        return str(session) in self.earlier_sessions

    def leave(self) -> None:
        """Its trainer has told everything after a stop."""
        self.session = None

    def save(self, name: str, sha256: str, size_bytes: int, epoch: int) -> None:
        """A network was saved, in place of any earlier one of the name."""
        others = [file for file in self.files if file["name"] != name]
        self.files = [*others, {"name": name, "sha256": sha256, "size_bytes": size_bytes, "epoch": epoch}]

    def forget(self, name: str) -> None:
        """A network is not wanted any more."""
        self.files = [file for file in self.files if file["name"] != name]

    def end(self, outcome: str, reason: str = "") -> None:
        """It has ended, if it has not before. A completed one is so when it is settled."""
        if self.is_ended:
            return
        self.outcome, self.reason, self.end_time = outcome, reason, now()
        self.status = UPLOADING if outcome == COMPLETED else outcome
        self.waits_for = ""

    def settle(self, outcome: str, reason: str) -> None:
        """Everything that follows its end was done; a completed one whose network is refused has failed after all."""
        self.outcome = self.status = outcome
        self.reason, self.is_settled = reason, True


class Event(SQLModel, table=True):
    """Something that was noted of a training: kind is log, saved or preview."""

    __tablename__ = "training_event"

    id: int | None = Field(default=None, primary_key=True, sa_type=BigInteger)
    training_id: UUID
    kind: str
    data: dict[str, Any] = Field(sa_type=_JSON)
    time: datetime = Field(default_factory=now, sa_type=_TIME)


class Metric(SQLModel, table=True):
    """A step."""

    __tablename__ = "training_metric"

    training_id: UUID = Field(primary_key=True)
    step: int = Field(primary_key=True)
    epoch: int
    loss: float
    average_loss: float
    learning_rates: dict[str, float] = Field(sa_type=_JSON)
