"""How much of the queue one user may have: jobs that wait, GPU-seconds per hour. For use in a store's transaction."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from math import ceil

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from services.common.errors import ResourceExhausted
from services.inference.queue.claim import QUEUED
from services.inference.rows import Job, Usage

_HOUR = timedelta(hours=1)
_MINUTE = timedelta(minutes=1)
_FULL_QUEUE_SECONDS = 10  # when to try again; how long a job takes nobody knows
_LOCK = 0x71756F74  # of this module, for advisory locks by owner


@dataclass(frozen=True)
class Quotas:
    """Of each user; 0 is no limit."""

    max_queued_jobs: int = 0
    max_gpu_seconds_per_hour: float = 0.0


NO_QUOTAS = Quotas()


async def admit(session: AsyncSession, owner: str, quotas: Quotas) -> None:
    """Lets a user's job into the queue.

    Raises:
        ResourceExhausted: not now; it tells when to try again.
    """
    if quotas.max_queued_jobs:
        # Two jobs that come at once are counted one after the other.
        await session.execute(select(func.pg_advisory_xact_lock(_LOCK, func.hashtext(owner))))
        waiting = select(func.count()).select_from(Job).where(col(Job.owner) == owner, QUEUED)
        num_waiting = await session.scalar(waiting) or 0
        if num_waiting >= quotas.max_queued_jobs:
            raise ResourceExhausted(
                f"{num_waiting} jobs of {owner} wait already; at most {quotas.max_queued_jobs} are possible",
                retry_after_seconds=_FULL_QUEUE_SECONDS,
            )
    if quotas.max_gpu_seconds_per_hour:
        await _admit_by_usage(session, owner, quotas.max_gpu_seconds_per_hour)


async def _admit_by_usage(session: AsyncSession, owner: str, max_seconds: float) -> None:
    recent = select(col(Usage.minute), col(Usage.gpu_seconds), func.now()).where(
        col(Usage.owner) == owner, col(Usage.minute) > func.now() - _HOUR - _MINUTE
    )
    minutes = (await session.execute(recent.order_by(col(Usage.minute)))).all()
    used = total = sum(seconds for _, seconds, _ in minutes)
    for minute, seconds, now in minutes:
        if used < max_seconds:
            return
        used -= seconds
        if used < max_seconds:
            raise ResourceExhausted(
                f"{owner} has used {total:.0f} GPU-seconds within the last hour; {max_seconds:g} are possible",
                retry_after_seconds=_until(minute, now),
            )


def _until(minute: datetime, now: datetime) -> int:
    """In how many seconds what was used in that minute does not count any more."""
    return max(1, ceil((minute + _MINUTE + _HOUR - now).total_seconds()))


async def note_usage(session: AsyncSession, job: Job, gpu_seconds: float) -> None:
    """Adds to what the job's owner has used."""
    if gpu_seconds <= 0:
        return
    first = insert(Usage).values(owner=job.owner, minute=func.date_trunc("minute", func.now()), gpu_seconds=gpu_seconds)
    more = {"gpu_seconds": col(Usage.gpu_seconds) + gpu_seconds}
    await session.execute(first.on_conflict_do_update(index_elements=["owner", "minute"], set_=more))
