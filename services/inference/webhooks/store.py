"""Webhooks of jobs that have ended, in PostgreSQL. One method is one transaction.

A row comes into being in the transaction that ends its job, by a trigger: whatever ends a job cannot forget it. Times
are the database's.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    Integer,
    Select,
    Table,
    Text,
    bindparam,
    case,
    func,
    literal_column,
    select,
    true,
    tuple_,
    update,
)
from sqlmodel import col

from services.common.database import Database, notify
from services.common.ids import parse_id
from services.inference.channels import WEBHOOKS_DUE
from services.inference.rows import DEAD, DELIVERED, PENDING, Job, Webhook

_WEBHOOK: Table = Webhook.__table__  # type: ignore[attr-defined]
_PENDING: Any = literal_column("webhook.state = 'pending'")  # as the index's condition has it


def _owners() -> Any:
    """The owners of pending webhooks of whom fewer than `share` calls are under way, with that number (`num_calls`).

    They are looked for one after the other, each by the index, so it does not matter how many webhooks an owner has.
    """
    owner = _WEBHOOK.c.owner
    owners = select(func.min(owner).label("owner")).where(_PENDING).cte("owners", recursive=True)
    later = select(func.min(owner)).where(_PENDING, owner > owners.c.owner).scalar_subquery()
    owners = owners.union_all(select(later).where(owners.c.owner.is_not(None)))
    calls = func.array_positions(bindparam("calls", type_=ARRAY(Text)), owners.c.owner)
    num_calls = func.cardinality(calls)
    wanted = select(owners.c.owner, num_calls.label("num_calls"))
    return wanted.where(owners.c.owner.is_not(None), num_calls < bindparam("share", type_=Integer)).cte("wanted")


def _next(owners: Any) -> Select[Any]:
    """The next webhook of each of the owners."""
    return (
        select(_WEBHOOK.c.job_id, _WEBHOOK.c.due_time)
        .where(_PENDING, _WEBHOOK.c.owner == owners.c.owner)
        .order_by(_WEBHOOK.c.due_time)
        .limit(1)
    )


def _claim_statement() -> Select[Any]:
    """Due webhooks, one of each owner, those first of whose owner the fewest calls are under way."""
    owners = _owners()
    due = _next(owners).where(_WEBHOOK.c.due_time <= func.now()).with_for_update(skip_locked=True).lateral("due")
    return (
        select(due.c.job_id)
        .select_from(owners.join(due, true()))
        .order_by(owners.c.num_calls, due.c.due_time)
        .limit(bindparam("number", type_=Integer))
    )


def _wait_statement() -> Select[Any]:
    owners = _owners()
    coming = _next(owners).lateral("coming")
    seconds = func.extract("epoch", func.min(coming.c.due_time) - func.now())
    return select(seconds).select_from(owners.join(coming, true()))


_CLAIM = _claim_statement()
_WAIT = _wait_statement()


class WebhookStore:
    """The webhooks."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def page(
        self, state: str, owner: str | None, limit: int, after: tuple[datetime, UUID] | None
    ) -> list[Webhook]:
        """Webhooks in this state or all, newest first, of this owner or all, after the position of another."""
        query = select(Webhook)
        if state:
            query = query.where(col(Webhook.state) == state)
        if owner is not None:
            query = query.where(col(Webhook.owner) == owner)
        if after is not None:
            query = query.where(tuple_(col(Webhook.create_time), col(Webhook.job_id)) < after)
        query = query.order_by(col(Webhook.create_time).desc(), col(Webhook.job_id).desc()).limit(limit)
        async with self._database.transaction() as session:
            return list(await session.scalars(query))

    async def find(self, job_id: str) -> Webhook | None:
        """The webhook of a job, if it has ended with one."""
        if (parsed := parse_id(job_id)) is None:
            return None
        async with self._database.transaction() as session:
            return await session.get(Webhook, parsed)

    async def resend(self, job_id: UUID) -> Webhook | None:
        """Makes a webhook due from now on. None: it is being called."""
        async with self._database.transaction() as session:
            webhook = await session.get(Webhook, job_id, with_for_update=True)
            if webhook is None or webhook.state == PENDING:
                return None
            webhook.resend(await session.scalar(select(func.clock_timestamp())) or webhook.due_time)
            await notify(session, WEBHOOKS_DUE, str(job_id))
            return webhook

    async def claim(
        self, limit: int, lease_seconds: float, calls: Collection[str] = (), share: int = 1
    ) -> list[tuple[Webhook, Job]]:
        """Up to so many webhooks that are due, for one attempt each. Nobody else gets them while the lease lasts.

        At most one of each owner, and none of who has their share in `calls`, the owners of the calls under way.
        """
        if limit <= 0:
            return []
        async with self._database.transaction() as session:
            given = {"number": limit, "calls": list(calls), "share": share}
            ids = list(await session.scalars(_CLAIM, given))
            if not ids:
                return []
            attempt = {
                "num_attempts": col(Webhook.num_attempts) + 1,
                "since_time": case((col(Webhook.num_attempts) == 0, func.clock_timestamp()), else_=Webhook.since_time),
                "due_time": func.clock_timestamp() + timedelta(seconds=lease_seconds),
            }
            these = update(Webhook).where(col(Webhook.job_id).in_(ids)).values(attempt).returning(Webhook)
            webhooks = await session.scalars(these.execution_options(synchronize_session=False))
            jobs = {job.id: job for job in await session.scalars(select(Job).where(col(Job.id).in_(ids)))}
            return [(webhook, jobs[webhook.job_id]) for webhook in webhooks]

    async def seconds_to_next(self, calls: Collection[str] = (), share: int = 1) -> float:
        """Seconds until one may be claimed; infinite when none waits."""
        async with self._database.transaction() as session:
            seconds = await session.scalar(_WAIT, {"calls": list(calls), "share": share})
            return float("inf") if seconds is None else max(0.0, float(seconds))

    async def end(self, webhook: Webhook, state: str, problem: str | None) -> None:
        """Records the end of the attempts: delivered or dead."""
        assert state in {DELIVERED, DEAD}
        await self._save(webhook, state=state, last_error=problem, end_time=func.clock_timestamp())

    async def retry(self, webhook: Webhook, problem: str, again_in_seconds: float) -> None:
        """Records a failed attempt, and when the next one is."""
        again = func.clock_timestamp() + timedelta(seconds=again_in_seconds)
        await self._save(webhook, last_error=problem, due_time=again)

    async def _save(self, webhook: Webhook, **fields: object) -> None:
        """Unless the attempt is not the latest: its lease was over, or the job was started and has ended again."""
        this = (
            (col(Webhook.job_id) == webhook.job_id)
            & (col(Webhook.message_id) == webhook.message_id)
            & (col(Webhook.num_attempts) == webhook.num_attempts)
            & (col(Webhook.state) == PENDING)
        )
        async with self._database.transaction() as session:
            await session.execute(update(Webhook).where(this).values(**fields))
