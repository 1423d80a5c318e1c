"""The pools of the endpoints in PostgreSQL: who works, what waits, and which endpoints went away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Select, Table, Uuid, bindparam, case, delete, func, select, true
from sqlalchemy.dialects.postgresql import insert

from services.common.database import Database, notify
from services.inference.channels import JOB_ENDED, MODELS_PINNED
from services.inference.queue.enqueue import enqueue
from services.inference.rows import Job, PinnedModels, RetiredEndpoint, Worker
from services.inference.table import (
    JOB,
    QUEUED,
    UNDER_WAY,
    job_of,
    locked,
    read_job,
    recent_successes,
    save_job,
    totals,
)

_NUM_STRANDED = 1000
_WORKER: Table = Worker.__table__  # type: ignore[attr-defined]
_RETIRED: Table = RetiredEndpoint.__table__  # type: ignore[attr-defined]
_WORKERS = select(_WORKER.c.endpoint_id, func.array_agg(_WORKER.c.worker_id).label("worker_ids")).group_by(
    _WORKER.c.endpoint_id
)
_RETIRE = insert(_RETIRED)
_RETIRE = _RETIRE.on_conflict_do_update(index_elements=["endpoint_id"], set_={"reason": _RETIRE.excluded.reason})
_REVIVE = delete(_RETIRED).where(_RETIRED.c.endpoint_id == bindparam("endpoint", type_=Uuid))
_PINNED: Table = PinnedModels.__table__  # type: ignore[attr-defined]
_PINS = select(_PINNED.c.names).where(_PINNED.c.endpoint_id == bindparam("endpoint", type_=Uuid))
_PIN = insert(_PINNED)
_PIN = _PIN.on_conflict_do_update(index_elements=["endpoint_id"], set_={"names": _PIN.excluded.names})
_UNPIN = delete(_PINNED).where(_PINNED.c.endpoint_id == bindparam("endpoint", type_=Uuid))
_STRANDED = (
    select(JOB, _RETIRED.c.reason)
    .join(_RETIRED, _RETIRED.c.endpoint_id == JOB.c.endpoint_id)
    .where(QUEUED)
    .limit(_NUM_STRANDED)
)
_STRANDED_HERE = _STRANDED.where(JOB.c.endpoint_id == bindparam("endpoint", type_=Uuid))
# Unless another replica has moved it meanwhile.
_THIS_STRANDED = locked(
    select(JOB).where(JOB.c.id == bindparam("id"), JOB.c.endpoint_id == bindparam("endpoint", type_=Uuid), QUEUED)
)


@dataclass(frozen=True)
class PoolState:
    """The workers with a stream, the jobs, and how long one worker would take for all of them, where that is known."""

    worker_ids: list[str]
    num_queued: int = 0
    num_held: int = 0
    work_seconds: float | None = None


def _work() -> Select[Any]:
    """Of each endpoint with jobs under way: how many, their cost, and what the last successes cost and took."""
    held = func.count(JOB.c.lease_id)
    # Those that are held are half done, on average.
    cost = func.sum(case((JOB.c.lease_id.is_(None), JOB.c.cost_seconds), else_=JOB.c.cost_seconds / 2))
    jobs = (
        select(JOB.c.endpoint_id, (func.count() - held).label("num_queued"), held.label("num_held"), cost.label("cost"))
        .where(UNDER_WAY)
        .group_by(JOB.c.endpoint_id)
        .subquery()
    )
    finished = totals(recent_successes(jobs.c.endpoint_id).correlate(jobs)).lateral()
    return select(jobs, finished).join(finished, true())


_WORK = _work()


class PoolStore:
    """The pools."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def pools(self) -> dict[UUID, PoolState]:
        """The pool of each endpoint that has workers or jobs under way."""
        found = {row["endpoint_id"]: PoolState(sorted(row["worker_ids"])) for row in await self._database.run(_WORKERS)}
        for row in await self._database.run(_WORK):
            worker_ids = found[row["endpoint_id"]].worker_ids if row["endpoint_id"] in found else []
            work_seconds = None
            if worker_ids and row["finished_cost"]:
                # Jobs that a worker runs at once take turns, and with a queue behind them they are as many as ever.
                at_once = max(1.0, row["num_held"] / len(worker_ids))
                work_seconds = row["cost"] * float(row["finished_seconds"]) / row["finished_cost"] / at_once
            found[row["endpoint_id"]] = PoolState(worker_ids, row["num_queued"], row["num_held"], work_seconds)
        return found

    async def pin(self, endpoint_id: UUID, names: list[str]) -> None:
        """Remembers which checkpoints the endpoint's workers keep ready, and tells those who speak with its workers."""
        async with self._database.atomic() as run:
            if names:
                await run(_PIN, endpoint_id=endpoint_id, names=names)
            else:
                await run(_UNPIN, endpoint=endpoint_id)
            await notify(run, MODELS_PINNED, str(endpoint_id))

    async def pinned(self, endpoint_id: UUID) -> list[str]:
        """The checkpoints that the endpoint's workers keep ready."""
        rows = await self._database.run(_PINS, endpoint=endpoint_id)
        return rows[0]["names"] if rows else []

    async def retire(self, endpoint_id: UUID, reason: str) -> None:
        """Remembers that an endpoint went away."""
        await self._database.run(_RETIRE, endpoint_id=endpoint_id, reason=reason)

    async def revive(self, endpoint_id: UUID) -> None:
        """Forgets that an endpoint went away, because it is usable again."""
        await self._database.run(_REVIVE, endpoint=endpoint_id)

    async def stranded(self, endpoint_id: UUID | None = None) -> list[tuple[Job, str]]:
        """Queued jobs of endpoints that went away (of this one), with the reason; at most 1000."""
        if endpoint_id is None:
            rows = await self._database.run(_STRANDED)
        else:
            rows = await self._database.run(_STRANDED_HERE, endpoint=endpoint_id)
        reasons = [row.pop("reason") for row in rows]
        return [(job_of(row), reason) for row, reason in zip(rows, reasons, strict=True)]

    async def move(self, stranded: Job, to: tuple[UUID, str, str]) -> bool:
        """Moves a job to another endpoint: id, name, instance type. False: it is not stranded any more."""
        async with self._database.atomic() as run:
            job = await read_job(run, _THIS_STRANDED, id=stranded.id, endpoint=stranded.endpoint_id)
            if job is not None:
                job.move(*to)
                await enqueue(run, job)
                await save_job(run, job)
            return job is not None

    async def fail_stranded(self, stranded: Job, reason: str) -> bool:
        """Fails a job. False: it is not stranded any more."""
        async with self._database.atomic() as run:
            job = await read_job(run, _THIS_STRANDED, id=stranded.id, endpoint=stranded.endpoint_id)
            if job is not None:
                job.fail(reason)
                await save_job(run, job)
                await notify(run, JOB_ENDED, str(job.id))
            return job is not None
