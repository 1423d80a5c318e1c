"""Idempotent submits: a key and the body that came with it, for a day. For use in a store's transaction."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from services.common.errors import AlreadyExists
from services.inference.rows import Job, Submission

LIFETIME = timedelta(hours=24)


class SubmittedBefore(AlreadyExists):
    """Another request with the same key was quicker."""


async def remember(session: AsyncSession, submission: Submission) -> None:
    """Notes a submission; one that is older than a day makes room for it.

    Raises:
        SubmittedBefore: there is one under the key.
    """
    fields = submission.model_dump()
    upsert = insert(Submission).values(fields)
    upsert = upsert.on_conflict_do_update(
        index_elements=["owner", "key"], set_=fields, where=col(Submission.create_time) < func.now() - LIFETIME
    )
    if await session.scalar(upsert.returning(col(Submission.job_id))) is None:
        raise SubmittedBefore(f'Idempotency-Key "{submission.key}" was used a moment ago')


async def find_submission(session: AsyncSession, owner: str, key: str) -> tuple[Submission, Job] | None:
    """What the owner created under the key within the last day."""
    query = select(Submission, Job).join(Job, col(Job.id) == col(Submission.job_id))
    query = query.where(col(Submission.owner) == owner, col(Submission.key) == key)
    row = (await session.execute(query.where(col(Submission.create_time) >= func.now() - LIFETIME))).first()
    return None if row is None else (row[0], row[1])
