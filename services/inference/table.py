"""The table of jobs as the stores speak to it: rows in and out, the orders that its indices have, and the conditions
that the partial ones know."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    ColumnElement,
    Executable,
    FromClause,
    Select,
    Table,
    bindparam,
    func,
    insert,
    literal_column,
    select,
    update,
)
from sqlalchemy.orm import class_mapper

from services.common.driver import Run
from services.inference.rows import Job

JOB: Table = Job.__table__  # type: ignore[attr-defined]
# Literal, because the planner uses a partial index only where it sees the index's own condition.
QUEUED: ColumnElement[bool] = literal_column("job.status = 'inprogress' AND job.lease_id IS NULL")
UNDER_WAY: ColumnElement[bool] = literal_column("job.status = 'inprogress'")
NOT_UNDER_WAY: ColumnElement[bool] = literal_column("job.status <> 'inprogress'")
SUCCEEDED: ColumnElement[bool] = literal_column("job.status = 'succeed'")
_NUM_RECENT = 16  # successes from which an endpoint's pace is taken
_RUN_SECONDS: ColumnElement[Any] = func.extract("epoch", JOB.c.complete_time - JOB.c.start_time)

_MANAGER = class_mapper(Job).class_manager
_ADD = insert(JOB)
_SAVE = update(JOB).where(JOB.c.id == bindparam("this"))


def locked(query: Select[Any]) -> Select[Any]:
    """The same rows of jobs, locked until the transaction ends."""
    return query.with_for_update(of=JOB)


def by_place(jobs: FromClause) -> tuple[ColumnElement[Any], ...]:
    """The order of the queue: real-time before async, then by priority, then by virtual start."""
    return jobs.c.priority_class, jobs.c.priority.desc(), jobs.c.virtual_start, jobs.c.id


def recent_successes(endpoint_id: Any, seconds: ColumnElement[Any] = _RUN_SECONDS) -> Select[Any]:
    """The endpoint's last successes: what each cost, and the `seconds` that it took."""
    found = select(JOB.c.cost_seconds, seconds.label("seconds")).where(JOB.c.endpoint_id == endpoint_id, SUCCEEDED)
    return found.order_by(JOB.c.complete_time.desc()).limit(_NUM_RECENT)


def totals(successes: Select[Any]) -> Select[Any]:
    """What successes took and cost together, as `finished_seconds` and `finished_cost`; both are null of none."""
    each = successes.subquery()
    seconds = func.sum(func.greatest(each.c.seconds, 0))  # an old row has the times of two clocks
    cost = func.sum(each.c.cost_seconds)
    return select(seconds.label("finished_seconds"), cost.label("finished_cost")).where(each.c.seconds.is_not(None))


def job_of(row: dict[str, Any]) -> Job:
    """The job of a whole row, as a session of SQLAlchemy would make it: `Job(**row)` takes 30 times as long."""
    job: Job = _MANAGER.new_instance()
    job.__dict__.update(row)
    return job


async def read_jobs(run: Run, query: Executable, **values: Any) -> list[Job]:
    """The jobs whose rows the query gives."""
    return [job_of(row) for row in await run(query, **values)]


async def read_job(run: Run, query: Executable, **values: Any) -> Job | None:
    """The job whose row the query gives, if it gives one."""
    jobs = await read_jobs(run, query, **values)
    return jobs[0] if jobs else None


async def add_job(run: Run, job: Job) -> None:
    """Writes a new row."""
    await run(_ADD, **columns(job))


async def save_job(run: Run, job: Job) -> None:
    """Writes the row anew; it must be locked."""
    await run(_SAVE, this=job.id, **columns(job))


def columns(job: Job) -> dict[str, Any]:
    """The values of a job's row."""
    return {name: getattr(job, name) for name in JOB.c.keys()}  # noqa: SIM118 - iterating gives the columns themselves
