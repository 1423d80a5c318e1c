"""Webhooks of jobs that have ended, in PostgreSQL. One method is one transaction.

A row comes into being in the transaction that ends its job, by a trigger: whatever ends a job cannot forget it.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import func, select, tuple_, update
from sqlmodel import col

from services.common.database import Database, notify
from services.inference.rows import DEAD, DELIVERED, PENDING, Job, Webhook
from services.inference.signals import WEBHOOKS_DUE


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
        try:
            parsed = UUID(job_id)
        except ValueError:
            return None
        async with self._database.transaction() as session:
            return await session.get(Webhook, parsed)

    async def resend(self, job_id: UUID) -> Webhook | None:
        """Makes a webhook due from now on. None: it is being called."""
        async with self._database.transaction() as session:
            webhook = await session.get(Webhook, job_id, with_for_update=True)
            if webhook is None or webhook.state == PENDING:
                return None
            webhook.resend()
            await notify(session, WEBHOOKS_DUE, str(job_id))
            return webhook

    async def claim(self, limit: int, lease_seconds: float) -> list[tuple[Webhook, Job]]:
        """Up to so many webhooks that are due, for one attempt each. Nobody else gets them while the lease lasts."""
        due = (
            select(Webhook, Job)
            .join(Job, col(Job.id) == col(Webhook.job_id))
            .where(col(Webhook.state) == PENDING, col(Webhook.due_time) <= func.now())
            .order_by(col(Webhook.due_time))
            .limit(limit)
            .with_for_update(of=Webhook, skip_locked=True)
        )
        if limit <= 0:
            return []
        async with self._database.transaction() as session:
            found = [(webhook, job) for webhook, job in await session.execute(due)]
            for webhook, _ in found:
                webhook.attempt(lease_seconds)
            return found

    async def seconds_to_next(self) -> float:
        """Seconds until one is due; infinite when none waits."""
        next_time = select(func.extract("epoch", func.min(Webhook.due_time) - func.now())).where(
            col(Webhook.state) == PENDING
        )
        async with self._database.transaction() as session:
            seconds = await session.scalar(next_time)
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
