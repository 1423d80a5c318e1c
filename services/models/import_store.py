"""Remembers imports until they end. One method is one transaction.

Each attempt at an import takes the row for its `run`; one that another has followed finds that it is `Superseded`.
"""

# No `from __future__ import annotations`: SQLModel reads the columns' types at run time.

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import Field, SQLModel, col

from services.common.audit import Audit
from services.common.database import Database
from services.common.errors import ResourceExhausted
from services.models.chores import Chores
from services.models.rows import Checkpoint, CheckpointFile
from services.models.store import NameInUse, disable, used_name

_LOCK = 0x696D706F  # of this module, for advisory locks by creator: their imports are counted one request at a time
_RETRY_SECONDS = 60  # of a user with too many imports; nobody knows when one ends
IMPORT = "import"  # a chore, and the word of params that shows how far it is


class Superseded(Exception):
    """The import is somebody else's now, or its checkpoint was deleted."""


class Import(SQLModel, table=True):
    """An import that has not ended. `parts` are (ETag, size) in order; by `validator` the source is known to be the
    same. `began_at` is when its first attempt began; `num_failures` have failed since the last part.
    """

    __tablename__ = "imports"

    checkpoint_id: UUID = Field(foreign_key="checkpoints.id", primary_key=True)
    url: str
    sha256: str = ""
    run: UUID | None = None
    validator: str = ""
    parts: list[list[Any]] = Field(default_factory=list, sa_type=JSONB)
    bytes_done: int = Field(default=0, sa_type=sa.BigInteger)
    bytes_total: int | None = Field(default=None, sa_type=sa.BigInteger)
    began_at: datetime | None = Field(default=None, sa_type=sa.DateTime(timezone=True))
    num_failures: int = 0


class ImportStore:
    """The table of imports, and what they change in checkpoints."""

    def __init__(self, database: Database, chores: Chores, audit: Audit) -> None:
        self._database = database
        self._chores = chores
        self._audit = audit

    async def add_imports(
        self, creator: str, imports: Sequence[tuple[Checkpoint, Import]], max_unfinished: int
    ) -> None:
        """Adds a user's checkpoints and their imports, all or none; they begin when this is committed, those of users
        with fewer unfinished ones first.

        Raises:
            NameInUse: somebody else was faster. ResourceExhausted: more than `max_unfinished` would not have ended (0:
            there is no bound).
        """
        facts = {str(checkpoint.id): checkpoint.facts() for checkpoint, _ in imports}
        of_creator = col(Checkpoint.params)["creator"].astext == creator
        unfinished = sa.select(sa.func.count()).select_from(Import).join(Checkpoint).where(of_creator)
        try:
            async with self._database.transaction() as session:
                await session.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK, sa.func.hashtext(creator))))
                num_unfinished = (await session.execute(unfinished)).scalar_one()
                if 0 < max_unfinished < num_unfinished + len(imports):
                    raise ResourceExhausted(
                        f"{num_unfinished} imports of {creator} have not ended; with {len(imports)} more there would "
                        f"be more than {max_unfinished}",
                        retry_after_seconds=_RETRY_SECONDS,
                    )
                session.add_all([checkpoint for checkpoint, _ in imports])
                await session.flush()
                session.add_all([one for _, one in imports])
                await session.flush()
                for number, (checkpoint, _) in enumerate(imports, num_unfinished):
                    arguments = {"checkpoint_id": str(checkpoint.id)}
                    await self._chores.defer(session, IMPORT, str(checkpoint.id), arguments, priority=-number)
                for checkpoint_id, after in facts.items():
                    await self._audit.record(session, "checkpoint.create", checkpoint_id, after=after)
        except IntegrityError:
            names = [name for checkpoint, _ in imports for name in checkpoint.names]
            async with self._database.transaction() as session:
                raise NameInUse(await used_name(session, names) or ", ".join(names)) from None

    async def begin(self, checkpoint_id: UUID) -> tuple[Checkpoint, Import] | None:
        """Takes the import for a new attempt; None when there is nothing to do any more."""
        async with self._database.transaction() as session:
            row = await session.get(Import, checkpoint_id, with_for_update=True)
            checkpoint = await session.get(Checkpoint, checkpoint_id)
            if row is None or checkpoint is None:
                return None
            row.run = uuid4()
            row.began_at = row.began_at or datetime.now(UTC)
            return checkpoint, row

    async def find_imports(self, began_before: datetime) -> list[Import]:
        """Imports that began before then."""
        wanted = sa.select(Import).where(col(Import.began_at) < began_before)
        async with self._database.transaction() as session:
            return list((await session.execute(wanted)).scalars())

    async def save_name(self, held: Import, name: str, key: str) -> Checkpoint:
        """Gives the import's file its name.

        Raises:
            NameInUse, Superseded.
        """
        try:
            async with self._database.transaction() as session:
                checkpoint, _ = await _held(session, held)
                before = checkpoint.facts()
                checkpoint.files.append(new_file(checkpoint.id, name, key))
                await self._audit.record(session, "checkpoint.name", str(checkpoint.id), before, checkpoint.facts())
                return checkpoint
        except IntegrityError:
            raise NameInUse(name) from None

    async def save_start(self, held: Import, upload: dict[str, str], validator: str, total: int | None) -> Import:
        """Notes that the transfer begins, from the first byte, with this upload (`uploadId`, `bucket`, `key`).

        Raises:
            Superseded.
        """
        async with self._database.transaction() as session:
            checkpoint, row = await _held(session, held)
            row.parts, row.bytes_done, row.bytes_total, row.validator = [], 0, total, validator
            file = checkpoint.files[0]
            file.upload_id = upload["uploadId"]
            _show(checkpoint, row)
            checkpoint.params = checkpoint.params | {"multipart_upload": {file.name: upload}}
            return row

    async def save_part(self, held: Import, etag: str, size_bytes: int, is_last: bool) -> Import:
        """Notes a part that the object store has; the last tells the total.

        Raises:
            Superseded.
        """
        async with self._database.transaction() as session:
            checkpoint, row = await _held(session, held)
            row.parts = [*row.parts, [etag, size_bytes]]
            row.bytes_done += size_bytes
            row.bytes_total = row.bytes_done if is_last else row.bytes_total
            row.num_failures = 0
            _show(checkpoint, row)
            return row

    async def save_failure(self, held: Import) -> int:
        """Notes that an attempt has failed, and answers how many have since the last part.

        Raises:
            Superseded.
        """
        async with self._database.transaction() as session:
            _, row = await _held(session, held)
            row.num_failures += 1
            return row.num_failures

    async def save_refusal(self, held: Import, error: str) -> None:
        """Ends the import: disables its checkpoint, unless that has ended already, and has its objects removed.

        Raises:
            Superseded.
        """
        async with self._database.transaction() as session:
            checkpoint, row = await _held(session, held)
            await session.delete(row)
            if checkpoint.is_unfinished:
                await disable(session, checkpoint, error, self._chores, self._audit)

    async def remove(self, checkpoint_id: UUID) -> None:
        """Forgets an import that has ended."""
        async with self._database.transaction() as session:
            if row := await session.get(Import, checkpoint_id):
                await session.delete(row)


def new_file(checkpoint_id: UUID, name: str, key: str) -> CheckpointFile:
    """A file whose upload is not open yet."""
    return CheckpointFile(checkpoint_id=checkpoint_id, position=0, name=name, key=key, upload_id="", parts_number=0)


async def _held(session: AsyncSession, held: Import) -> tuple[Checkpoint, Import]:
    checkpoint = await session.get(Checkpoint, held.checkpoint_id, with_for_update=True)
    row = await session.get(Import, held.checkpoint_id, with_for_update=True)
    if checkpoint is None or row is None or row.run != held.run:
        raise Superseded
    return checkpoint, row


def _show(checkpoint: Checkpoint, row: Import) -> None:
    shown = {"url": checkpoint.source, "bytes_done": row.bytes_done, "bytes_total": row.bytes_total}
    checkpoint.params = checkpoint.params | {IMPORT: shown}
