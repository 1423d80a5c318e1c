"""How a job gets its place in the queue; claim.py is the other end. To be used within a store's transaction."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Float, Select, Text, Uuid, bindparam, cast, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlmodel import col

from services.common.driver import Run
from services.inference.channels import JOBS_QUEUED
from services.inference.queue.claim import QUEUE_CLOCK
from services.inference.rows import Job, UserClock

_LOCK = 0x71756F74  # of this module, for advisory locks by owner
_ENDPOINT: Any = bindparam("endpoint", type_=Uuid)
_OWNER: Any = bindparam("owner", type_=Text)
_COST: Any = bindparam("cost", type_=Float)


def _place() -> Select[Any]:
    """The virtual start at the end of the owner's work, or now by the queue's clock. Wakes the endpoint's workers.

    Jobs of one owner get their places one after the other: until the transaction ends, whoever comes next waits.
    """
    clock = col(UserClock.virtual_time)
    turn = select(func.pg_advisory_xact_lock(_LOCK, func.hashtext(_OWNER)).label("turn")).cte("turn")
    queue_time = (
        select(func.coalesce(func.max(clock), 0.0))
        .where(col(UserClock.endpoint_id) == _ENDPOINT, col(UserClock.username) == QUEUE_CLOCK)
        .scalar_subquery()
    )
    first = insert(UserClock).from_select(
        ["endpoint_id", "username", "virtual_time"], select(_ENDPOINT, _OWNER, queue_time + _COST).select_from(turn)
    )
    later = func.greatest(clock, queue_time) + _COST
    advanced = first.on_conflict_do_update(
        index_elements=["endpoint_id", "username"], set_={"virtual_time": later}
    ).returning((clock - _COST).label("virtual_start"))
    place = advanced.cte("place")
    time = func.clock_timestamp().label("time")
    return select(place.c.virtual_start, time, func.pg_notify(JOBS_QUEUED, cast(_ENDPOINT, Text)))


_PLACE = _place()


async def enqueue(run: Run, job: Job) -> datetime:
    """Gives the job its virtual start, and wakes the endpoint's workers when the transaction commits.

    Answers what time it is by the database's clock.
    """
    (place,) = await run(_PLACE, endpoint=job.endpoint_id, owner=job.owner, cost=job.cost_seconds)
    job.virtual_start = place["virtual_start"]
    time: datetime = place["time"]
    return time
