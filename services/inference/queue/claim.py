"""The claim: which queued jobs a worker gets, decided and leased in one SQL statement.

Fairness is start-time fair queuing (Goyal, Vin, Cheng 1996): a job's virtual start is the later of the queue's clock
and the end of its owner's last job, and the queue's clock is the virtual start of the job taken last.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import ARRAY, Integer, Select, Text, Uuid, all_, any_, bindparam, func, literal_column, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlmodel import col

from services.inference.rows import LAST_ATTEMPT, UserClock, Worker
from services.inference.table import JOB, QUEUED, by_place

WARM_WINDOW = 32  # a warm job is looked for among so many at the front
MAX_PASSED_OVER = 8  # so often the first in the queue lets a warm one go before it
QUEUE_CLOCK = ""  # the username of the queue's own clock


def of_stream(endpoint_id: Any, worker_id: Any, stream_id: Any) -> Any:
    """The row of a worker, as long as this is its stream."""
    return (
        (col(Worker.endpoint_id) == endpoint_id)
        & (col(Worker.worker_id) == worker_id)
        & (col(Worker.stream_id) == stream_id)
    )


def has_room(endpoint_id: Any, worker_id: Any) -> Any:
    """Whether the worker may hold another job: not while it has one on its last attempt, which is run alone."""
    held = JOB.alias("held")
    mine = (held.c.endpoint_id == endpoint_id) & (held.c.worker_id == worker_id) & held.c.lease_id.is_not(None)
    return ~select(held.c.id).where(mine, held.c.num_lost >= LAST_ATTEMPT).exists()


def is_offered(worker_id: Any) -> Any:
    """Whether a job is for the worker: one that it had no room for is not, while there is another one to try."""
    other = select(col(Worker.worker_id)).where(
        col(Worker.endpoint_id) == JOB.c.endpoint_id, col(Worker.worker_id) != all_(JOB.c.declined_by)
    )
    return (worker_id != all_(JOB.c.declined_by)) | ~other.exists()


def _claim_statement() -> Select[Any]:
    """The claim: real-time before async, then by priority, then by virtual start, but a warm job among the first ones
    before a cold one.

    A job at the front that was passed over too often goes first whatever is warm. One on its last attempt is taken when
    it is the first, and nothing with it or while its worker has it; what is before it goes without it. Row locks with
    SKIP LOCKED let several claims run at once; the worker's own row is locked too: a stream that was superseded leases
    nothing.
    """
    # Not named as columns are: an UPDATE takes such parameters for values to set.
    endpoint_id: Any = bindparam("endpoint", type_=Uuid)
    worker_id: Any = bindparam("worker", type_=Text)
    stream_id: Any = bindparam("stream", type_=Uuid)
    place = (JOB.c.priority_class, JOB.c.priority, JOB.c.virtual_start, JOB.c.id)
    front = select(*place, JOB.c.base_model_key, JOB.c.passed_over, JOB.c.num_lost).where(
        JOB.c.endpoint_id == endpoint_id, QUEUED, is_offered(worker_id)
    )
    head = front.order_by(*by_place(JOB)).limit(WARM_WINDOW).cte("head")
    stream = (
        select(col(Worker.worker_id)).where(of_stream(endpoint_id, worker_id, stream_id)).with_for_update(read=True)
    )
    me = stream.cte("me")
    order = (
        head.c.priority_class,
        head.c.priority.desc(),
        (head.c.passed_over >= MAX_PASSED_OVER).desc(),
        (head.c.base_model_key == any_(bindparam("warm_models", type_=ARRAY(Text)))).desc(),
        head.c.virtual_start,
        head.c.id,
    )
    num_alone = func.count().filter(head.c.num_lost >= LAST_ATTEMPT).over(order_by=order, rows=(None, 0))
    turn = func.row_number().over(order_by=order)
    turns = select(head.c.id, turn.label("turn"), num_alone.label("num_alone")).cte("turns")
    # Decided once: where statistics are of a time when nobody waited, it would be for each job that waits.
    turns = turns.prefix_with("MATERIALIZED")
    chosen = (
        select(JOB.c.id, JOB.c.virtual_start)
        .join(turns, turns.c.id == JOB.c.id)
        .where(QUEUED, select(me.c.worker_id).exists(), has_room(endpoint_id, worker_id))
        .where((turns.c.turn == 1) | (turns.c.num_alone == 0))
        .order_by(turns.c.turn)
        .limit(bindparam("num_jobs", type_=Integer))
        .with_for_update(of=JOB, skip_locked=True)
        .cte("chosen")
    )
    leased = (
        update(JOB)
        .where(JOB.c.id == chosen.c.id)
        .values(
            lease_id=func.gen_random_uuid(),
            worker_id=worker_id,
            is_running=False,
            claim_time=func.clock_timestamp(),
            num_claims=JOB.c.num_claims + 1,
        )
        .returning(*JOB.c)
        .cte("leased")
    )
    return select(leased).add_cte(_passed_over(head, chosen), _advanced_clock(chosen))


def _passed_over(head: Any, chosen: Any) -> Any:
    """Counts that the first in the queue was passed over, if it was."""
    first = select(head.c.id).order_by(*by_place(head)).limit(1)
    waiting = (
        select(JOB.c.id)
        .where(JOB.c.id == first.scalar_subquery(), QUEUED)
        .where(select(chosen.c.id).exists(), JOB.c.id.not_in(select(chosen.c.id)))
        .with_for_update(skip_locked=True)
    )
    return update(JOB).where(JOB.c.id.in_(waiting)).values(passed_over=JOB.c.passed_over + 1).cte("passed")


def _advanced_clock(chosen: Any) -> Any:
    """Sets the queue's clock to the virtual start of what was taken."""
    latest = func.max(chosen.c.virtual_start)
    values = select(bindparam("endpoint", type_=Uuid), literal_column("''"), latest).having(func.count() > 0)
    taken = insert(UserClock).from_select(["endpoint_id", "username", "virtual_time"], values)
    later = func.greatest(col(UserClock.virtual_time), taken.excluded.virtual_time)
    return taken.on_conflict_do_update(index_elements=["endpoint_id", "username"], set_={"virtual_time": later}).cte(
        "clock"
    )


CLAIM = _claim_statement()  # built once; building it takes longer than running it
