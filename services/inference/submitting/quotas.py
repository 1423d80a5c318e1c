"""How much of the queue one user may have: jobs that wait, GPU-seconds per hour. For use in a store's transaction."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from math import ceil
from typing import Any

from sqlalchemy import Float, Select, Text, Uuid, bindparam, func, select
from sqlalchemy.dialects.postgresql import Insert, insert
from sqlmodel import col

from services.common.driver import Run
from services.common.errors import ResourceExhausted
from services.inference.rows import Job, Usage
from services.inference.table import JOB, QUEUED, recent_successes

_HOUR = timedelta(hours=1)
_MINUTE = timedelta(minutes=1)
_FULL_QUEUE_SECONDS = 10  # when to try again; how long a job takes nobody knows

_OWNER: Any = bindparam("owner", type_=Text)
_WAITING = select(func.count().label("number")).select_from(JOB).where(JOB.c.owner == _OWNER, QUEUED)
_RECENT = (
    select(col(Usage.minute), col(Usage.gpu_seconds), func.now().label("now"))
    .where(col(Usage.owner) == _OWNER, col(Usage.minute) > func.now() - (_HOUR + _MINUTE))
    .order_by(col(Usage.minute))
)


def _pending() -> Select[Any]:
    """The GPU-seconds that the owner's jobs under way will take, by the pace of the endpoint's last successes."""
    mine = select(func.coalesce(func.sum(JOB.c.cost_seconds), 0.0)).where(JOB.c.owner == _OWNER)
    cost = mine.where(QUEUED).scalar_subquery() + mine.where(JOB.c.lease_id.is_not(None)).scalar_subquery()
    seconds = JOB.c.timings["pipeline_seconds"].astext.cast(Float)
    last = recent_successes(bindparam("endpoint", type_=Uuid), seconds).subquery()
    pace = select(func.sum(last.c.seconds) / func.nullif(func.sum(last.c.cost_seconds), 0.0)).scalar_subquery()
    return select((cost * func.coalesce(pace, 1.0)).label("seconds"))


_PENDING = _pending()


def noting(usage: Select[Any]) -> Insert:
    """The statement that adds rows of (owner, GPU-seconds) to what the owners have used in this minute."""
    used = usage.subquery()
    minute = func.date_trunc("minute", func.now())
    first = insert(Usage).from_select(["owner", "gpu_seconds", "minute"], select(*used.c, minute))
    more = col(Usage.gpu_seconds) + first.excluded.gpu_seconds
    return first.on_conflict_do_update(index_elements=["owner", "minute"], set_={"gpu_seconds": more})


_NOTE = noting(select(_OWNER, bindparam("used_seconds", type_=Float).label("gpu_seconds")))


@dataclass(frozen=True)
class Quotas:
    """Of each user; 0 is no limit."""

    max_queued_jobs: int = 0
    max_gpu_seconds_per_hour: float = 0.0


NO_QUOTAS = Quotas()


async def admit(run: Run, job: Job, quotas: Quotas) -> None:
    """Lets a job into the queue, in which it has its place (`enqueue`) but does not stand yet.

    GPU-seconds are those of the last hour, and those that the owner's jobs under way can be expected to take.

    Raises:
        ResourceExhausted: not now; it tells when to try again.
    """
    owner = job.owner
    if quotas.max_queued_jobs:
        # Two jobs that come at once are counted one after the other, because they got their places so.
        (waiting,) = await run(_WAITING, owner=owner)
        if waiting["number"] >= quotas.max_queued_jobs:
            raise ResourceExhausted(
                f"{waiting['number']} jobs of {owner} wait already; at most {quotas.max_queued_jobs} are possible",
                retry_after_seconds=_FULL_QUEUE_SECONDS,
            )
    if quotas.max_gpu_seconds_per_hour:
        await _admit_by_usage(run, job, quotas.max_gpu_seconds_per_hour)


async def _admit_by_usage(run: Run, job: Job, max_seconds: float) -> None:
    minutes = await run(_RECENT, owner=job.owner)
    used = sum(minute["gpu_seconds"] for minute in minutes)
    if used >= max_seconds:
        raise ResourceExhausted(
            f"{job.owner} has used {used:.0f} GPU-seconds within the last hour; {max_seconds:g} are possible",
            retry_after_seconds=_until_below(max_seconds, minutes, used),
        )
    (pending,) = await run(_PENDING, owner=job.owner, endpoint=job.endpoint_id)
    if used + pending["seconds"] >= max_seconds:
        raise ResourceExhausted(
            f"{job.owner} has used {used:.0f} GPU-seconds within the last hour, and the jobs under way will take about "
            f"{pending['seconds']:.0f}; {max_seconds:g} are possible",
            retry_after_seconds=_FULL_QUEUE_SECONDS,
        )


def _until_below(max_seconds: float, minutes: list[dict[str, Any]], used: float) -> int:
    """In how many seconds so many of the minutes, oldest first, do not count any more that there is room."""
    for minute in minutes:
        used -= minute["gpu_seconds"]
        if used < max_seconds:
            left: timedelta = minute["minute"] + _MINUTE + _HOUR - minute["now"]
            return max(1, ceil(left.total_seconds()))
    raise AssertionError("nothing used is below any limit")


async def note_usage(run: Run, job: Job, gpu_seconds: float) -> None:
    """Adds to what the job's owner has used."""
    if gpu_seconds > 0:
        await run(_NOTE, owner=job.owner, used_seconds=gpu_seconds)
