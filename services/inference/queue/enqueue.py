"""How a job gets its place in the queue; claim.py is the other end. To be used within a store's transaction."""

from __future__ import annotations

from sqlalchemy import Select, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from services.common.database import notify
from services.inference.queue.claim import QUEUE_CLOCK
from services.inference.rows import Job, UserClock
from services.inference.signals import DEADLINE_SET, JOBS_QUEUED


async def enqueue(session: AsyncSession, job: Job) -> None:
    """Gives the job its virtual start at the end of its owner's work, and wakes the endpoint's workers."""
    clock = col(UserClock.virtual_time)
    queue_time = (
        select(func.coalesce(func.max(clock), 0.0))
        .where(col(UserClock.endpoint_id) == job.endpoint_id, col(UserClock.username) == QUEUE_CLOCK)
        .scalar_subquery()
    )
    first = insert(UserClock).values(
        endpoint_id=job.endpoint_id, username=job.owner, virtual_time=queue_time + job.cost_seconds
    )
    later = func.greatest(clock, queue_time) + job.cost_seconds
    upsert = first.on_conflict_do_update(index_elements=["endpoint_id", "username"], set_={"virtual_time": later})
    with session.no_autoflush:  # until it has a virtual start the row contradicts its constraints
        job.virtual_start = await session.scalar(upsert.returning(clock - job.cost_seconds))
    await notify(session, JOBS_QUEUED, str(job.endpoint_id))
    if job.deadline_time is not None:
        await notify(session, DEADLINE_SET, str(job.id))


def locked(query: Select[Job]) -> Select[Job]:
    """The same rows of jobs, locked until the transaction ends."""
    return query.with_for_update(of=Job)
