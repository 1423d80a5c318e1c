"""What the database itself saw of every job: a trigger writes each change of a row down, in the same transaction."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import psycopg
from psycopg.rows import class_row, dict_row

_TRIGGER = """
CREATE TABLE chaos_history (
    number bigint GENERATED ALWAYS AS IDENTITY, at timestamptz NOT NULL, job_id uuid NOT NULL, change text NOT NULL,
    status text, lease_id uuid, worker_id text, is_running boolean, result_lease uuid, failure text, num_lost integer
);
CREATE FUNCTION chaos_note() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE job job%ROWTYPE;
BEGIN
    IF TG_OP = 'DELETE' THEN job := OLD; ELSE job := NEW; END IF;
    INSERT INTO chaos_history (at, job_id, change, status, lease_id, worker_id, is_running, result_lease, failure,
        num_lost)
    VALUES (clock_timestamp(), job.id, TG_OP, job.status, job.lease_id, job.worker_id, job.is_running,
        job.result_lease, job.failure, job.num_lost);
    RETURN NULL;
END $$;
CREATE TRIGGER chaos_note AFTER INSERT OR UPDATE OR DELETE ON job FOR EACH ROW EXECUTE FUNCTION chaos_note();
"""


@dataclass(frozen=True)
class Change:
    """A job's row after a change."""

    number: int
    at: datetime
    job_id: UUID
    change: str
    status: str
    lease_id: UUID | None
    worker_id: str | None
    is_running: bool
    result_lease: UUID | None
    failure: str | None
    num_lost: int

    @property
    def is_end(self) -> bool:
        """Whether the job has ended by it, or had before."""
        return self.status in {"succeed", "failed"}

    def __str__(self) -> str:
        held = f"held by {self.worker_id} under {self.lease_id}" if self.lease_id else ""
        words = ["running" if self.is_running else "", held, self.failure or ""]
        result = f"result under {self.result_lease}" if self.result_lease else ""
        return ", ".join(word for word in (f"{self.change.lower()}: {self.status}", *words, result) if word)


class History:
    """The inference service's database at `url`, as the driver reads it."""

    def __init__(self, url: str) -> None:
        self._url = url.replace("postgresql+psycopg", "postgresql")

    def begin(self) -> None:
        """Sets the trigger."""
        with psycopg.connect(self._url) as connection:
            connection.execute(_TRIGGER)

    def changes(self) -> dict[UUID, list[Change]]:
        """By job, in order."""
        found: dict[UUID, list[Change]] = defaultdict(list)
        with psycopg.connect(self._url) as connection:
            cursor = connection.cursor(row_factory=class_row(Change))
            for change in cursor.execute("SELECT * FROM chaos_history ORDER BY number"):
                found[change.job_id].append(change)
        return found

    def jobs(self) -> dict[UUID, dict[str, Any]]:
        """All rows."""
        with self._rows("SELECT * FROM job") as rows:
            return {row["id"]: row for row in rows}

    def leftovers(self) -> set[str]:
        """The prefixes that the cleaner knows of."""
        with self._rows("SELECT prefix FROM leftover") as rows:
            return {row["prefix"] for row in rows}

    @contextmanager
    def _rows(self, query: str) -> Iterator[Iterator[dict[str, Any]]]:
        with psycopg.connect(self._url) as connection:
            yield iter(connection.cursor(row_factory=dict_row).execute(query))
