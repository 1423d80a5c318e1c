"""Idempotent submits: a key and the body that came with it, for a day. For use in a store's transaction."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from sqlalchemy import Table, bindparam, func, select
from sqlalchemy.dialects.postgresql import insert

from services.common.driver import Run
from services.common.errors import AlreadyExists
from services.inference.rows import Job, Submission
from services.inference.table import JOB, job_of

LIFETIME = timedelta(hours=24)

_SUBMISSION: Table = Submission.__table__  # type: ignore[attr-defined]
_ADD = insert(_SUBMISSION)
_REMEMBER = _ADD.on_conflict_do_update(
    index_elements=["owner", "key"],
    set_={column.name: column for column in _ADD.excluded},
    where=_SUBMISSION.c.create_time < func.now() - LIFETIME,
).returning(_SUBMISSION.c.job_id)
_FIND = (
    select(JOB, _SUBMISSION.c.body_sha256)
    .join(JOB, JOB.c.id == _SUBMISSION.c.job_id)
    .where(
        _SUBMISSION.c.owner == bindparam("submitter"),
        _SUBMISSION.c.key == bindparam("key"),
        _SUBMISSION.c.create_time >= func.now() - LIFETIME,
    )
)


class SubmittedBefore(AlreadyExists):
    """Another request with the same key was quicker."""


async def remember(run: Run, submission: Submission) -> None:
    """Notes a submission; one that is older than a day makes room for it.

    Raises:
        SubmittedBefore: there is one under the key.
    """
    if not await run(_REMEMBER, **submission.model_dump()):
        raise SubmittedBefore(f'Idempotency-Key "{submission.key}" was used a moment ago')


async def find_submission(run: Run, owner: str, key: str) -> tuple[str, Job] | None:
    """What the owner created under the key within the last day: the SHA-256 of the request, and the job."""
    found: list[dict[str, Any]] = await run(_FIND, submitter=owner, key=key)
    return (found[0].pop("body_sha256"), job_of(found[0])) if found else None
