"""Remembers checkpoints and their files. One method is one transaction.

A file's name is unique among all files that are `reserved`, which a refused checkpoint's are not any more: its owner
will want to upload the mended file under the same name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, aggregate_order_by
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from services.common.audit import Audit
from services.common.database import Database
from services.common.errors import FailedPrecondition, NotFound
from services.common.viewer import Viewer
from services.models.chores import Chores
from services.models.rows import ACTIVE, DISABLED, INITIAL, Checkpoint, CheckpointCount, CheckpointFile

MOVE_OBJECTS = "move_objects"  # a chore
LOOK = "look_at_object"  # a chore
REMOVE_OBJECT = "remove_object"  # a chore
REMOVE_REFUSED = "remove_refused"  # a chore
REMOVE_OBJECTS = "remove_objects"  # a chore
_MAX_STALE = 100  # that are looked at together
# The words of params whose values are kept by the names of files.
_WORDS_BY_NAME = frozenset({"multipart_upload", "size", "sha256", "format", "architecture", "kind"})


class CheckpointNotFound(NotFound):
    """There is no checkpoint with the id."""

    def __init__(self, checkpoint_id: object) -> None:
        super().__init__(f"checkpoint not found with id {checkpoint_id}")


class NameInUse(FailedPrecondition):
    """Another file, of whatever type and status, has the name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} already exists, please use another or rename/delete exists")


@dataclass(frozen=True)
class Filters:
    """What a page is taken from: what all viewers see, of these statuses, types and owners. An empty list is any."""

    viewers: Sequence[Viewer] = ()
    statuses: Sequence[str] = ()
    types: Sequence[str] = ()
    owners: Sequence[str] = ()


@dataclass(frozen=True)
class Inspected:
    """What is known of a complete file; `found` goes to the checkpoint's params."""

    size_bytes: int
    sha256: str
    found: dict[str, str] = field(default_factory=dict)


class UsableFile(NamedTuple):
    """A complete file of an active checkpoint, with the names of all files of that one in order."""

    checkpoint_id: UUID
    type: str
    folder: str | None
    name: str
    all_names: list[str]
    key: str
    size_bytes: int
    sha256: str


def _usable() -> sa.Select[Any]:
    """The usable files among pairs of types and names. Asked at every job, so it is built once."""
    checkpoint: sa.Table = Checkpoint.__table__  # type: ignore[attr-defined]
    file: sa.Table = CheckpointFile.__table__  # type: ignore[attr-defined]
    siblings = file.alias("siblings")
    all_names = (
        sa.select(sa.func.array_agg(aggregate_order_by(siblings.c.name, siblings.c.position)))
        .where(siblings.c.checkpoint_id == checkpoint.c.id)
        .scalar_subquery()
    )
    texts = ARRAY(sa.Text)
    pairs = sa.select(*(sa.func.unnest(sa.bindparam(name, type_=texts)) for name in ("types", "names")))
    columns = (file.c.checkpoint_id, checkpoint.c.type, checkpoint.c.folder, file.c.name, all_names.label("all_names"))
    return (
        sa.select(*columns, file.c.key, file.c.size_bytes, file.c.sha256)
        .join(checkpoint, checkpoint.c.id == file.c.checkpoint_id)
        .where(
            sa.tuple_(checkpoint.c.type, file.c.name).in_(pairs),
            file.c.reserved,
            checkpoint.c.status == ACTIVE,
            sa.bindparam("sees_everything", type_=sa.Boolean)
            | checkpoint.c.owners.op("&&")(sa.bindparam("words", type_=texts))
            | (checkpoint.c.owners == sa.cast([], texts)),
        )
    )


_USABLE = _usable()


class ModelStore:
    """The tables of this service."""

    def __init__(self, database: Database, chores: Chores, audit: Audit) -> None:
        self._database = database
        self._chores = chores
        self._audit = audit

    async def find_used_name(self, names: Sequence[str]) -> str | None:
        """One of the names that is in use."""
        async with self._database.transaction() as session:
            return await used_name(session, names)

    async def add_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Adds a checkpoint with its files.

        Raises:
            NameInUse: somebody else was faster.
        """
        try:
            async with self._database.transaction() as session:
                session.add(checkpoint)
                await self._audit.record(session, "checkpoint.create", str(checkpoint.id), after=checkpoint.facts())
        except IntegrityError:
            used = await self.find_used_name(checkpoint.names)
            raise NameInUse(used or checkpoint.names[0]) from None

    async def get_checkpoint(self, checkpoint_id: UUID) -> Checkpoint:
        """The checkpoint.

        Raises:
            CheckpointNotFound.
        """
        async with self._database.transaction() as session:
            found = await session.get(Checkpoint, checkpoint_id)
        if found is None:
            raise CheckpointNotFound(checkpoint_id)
        return found

    async def find_checkpoints(self, checkpoint_ids: Sequence[UUID]) -> list[Checkpoint]:
        """Those of the checkpoints that exist."""
        wanted = sa.select(Checkpoint).where(col(Checkpoint.id).in_(checkpoint_ids))
        async with self._database.transaction() as session:
            return list((await session.execute(wanted)).scalars())

    async def page_checkpoints(self, filters: Filters, page: int, per_page: int) -> tuple[list[Checkpoint], int]:
        """The page (from 1), newest first, and the number of checkpoints on all pages."""
        async with self._database.transaction() as session:
            total = (await session.execute(count_statement(filters))).scalar_one()
            found = await session.execute(page_statement(filters, page, per_page))
            return list(found.scalars()), total

    async def resolve_files(
        self, names: Sequence[tuple[str, str]], viewer: Viewer
    ) -> dict[tuple[str, str], UsableFile]:
        """Active files that the viewer may use, by (type, name)."""
        rows = await self._database.run(
            _USABLE,
            types=[kind for kind, _ in names],
            names=[name for _, name in names],
            words=viewer.owner_words,
            sees_everything=viewer.sees_everything,
        )
        return {(row["type"], row["name"]): UsableFile(**row) for row in rows}

    async def save_complete(
        self, checkpoint_id: UUID, name: str, inspected: Inspected, status: str | None = None
    ) -> None:
        """Marks a file complete and keeps what its inspection found; with the last file the status is set, if given.

        Raises:
            CheckpointNotFound: it was deleted meanwhile.
        """
        async with self._database.transaction() as session:
            checkpoint = await _locked(session, checkpoint_id)
            before = checkpoint.facts()
            file = next(file for file in checkpoint.files if file.name == name)
            file.complete, file.size_bytes, file.sha256 = True, inspected.size_bytes, inspected.sha256
            merged = {"size": inspected.size_bytes, "sha256": inspected.sha256, **inspected.found}
            checkpoint.params = _merge(checkpoint.params, name, merged)
            if status is not None and checkpoint.error is None and checkpoint.has_all_files:
                checkpoint.status = status
            await self._audit.record(
                session, "checkpoint.complete_file", str(checkpoint_id), before, checkpoint.facts()
            )

    async def save_files(self, checkpoint_id: UUID, files: Sequence[CheckpointFile]) -> list[CheckpointFile] | None:
        """Gives a checkpoint these files in place of those that it has, but for those whose names others have; answers
        the ones it got, or None where it is not `Initial` any more, and keeps what it has.

        Raises:
            CheckpointNotFound: it was deleted meanwhile.
        """
        taken = sa.select(col(CheckpointFile.name)).where(
            col(CheckpointFile.reserved),
            col(CheckpointFile.checkpoint_id) != checkpoint_id,
            col(CheckpointFile.name).in_([file.name for file in files]),
        )
        async with self._database.transaction() as session:
            checkpoint = await _locked(session, checkpoint_id)
            if checkpoint.status != INITIAL:
                return None
            names = set((await session.execute(taken)).scalars())
            kept = [file for file in files if file.name not in names]
            checkpoint.files.clear()
            await session.flush()
            checkpoint.files.extend(kept)
            return kept

    async def save_look(self, checkpoint_id: UUID, name: str, status: str) -> None:
        """Has the object of a file looked at in the background, and the status set then. Its upload has ended.

        Raises:
            CheckpointNotFound: it was deleted meanwhile.
        """
        async with self._database.transaction() as session:
            checkpoint = await _locked(session, checkpoint_id)
            next(file for file in checkpoint.files if file.name == name).upload_id = ""
            arguments = {"checkpoint_id": str(checkpoint_id), "file_name": name, "status": status}
            await self._chores.defer(session, LOOK, str(checkpoint_id), arguments)

    async def save_status(self, checkpoint_id: UUID, status: str) -> Checkpoint:
        """Sets the status once all files are complete; until then nothing changes.

        Raises:
            CheckpointNotFound: it was deleted meanwhile.
        """
        async with self._database.transaction() as session:
            checkpoint = await _locked(session, checkpoint_id)
            before = checkpoint.facts()
            if checkpoint.error is None and checkpoint.has_all_files:
                checkpoint.status = status
            await self._audit.record(session, "checkpoint.update", str(checkpoint_id), before, checkpoint.facts())
            return checkpoint

    async def save_name(self, checkpoint_id: UUID, old: str, new: str, next_key: str) -> None:
        """Renames the first file if it is still called `old`, and has its object moved to `next_key`.

        Raises:
            CheckpointNotFound: it was deleted meanwhile. FailedPrecondition: it was renamed meanwhile. NameInUse.
        """
        try:
            async with self._database.transaction() as session:
                checkpoint = await _locked(session, checkpoint_id)
                before = checkpoint.facts()
                file = checkpoint.files[0]
                if file.name != old:
                    raise FailedPrecondition(f"{old} was renamed to {file.name} meanwhile")
                file.name, file.next_key = new, None if next_key == file.key else next_key
                checkpoint.params = {
                    word: {new if key == old else key: kept for key, kept in value.items()}
                    if word in _WORDS_BY_NAME and isinstance(value, dict)
                    else value
                    for word, value in checkpoint.params.items()
                }
                await session.flush()
                arguments = {"checkpoint_id": str(checkpoint_id)}
                await self._chores.defer(session, MOVE_OBJECTS, str(checkpoint_id), arguments)
                await self._audit.record(session, "checkpoint.rename", str(checkpoint_id), before, checkpoint.facts())
        except IntegrityError:
            raise NameInUse(new) from None

    async def save_moved(self, checkpoint_id: UUID, old_key: str, new_key: str, keep: timedelta) -> bool:
        """Notes that the object is at its new key now, and has the old one removed after a while.

        False, and nothing done, when that is not wanted any more.
        """
        async with self._database.transaction() as session:
            checkpoint = await session.get(Checkpoint, checkpoint_id, with_for_update=True)
            for file in checkpoint.files if checkpoint else ():
                if checkpoint and (file.key, file.next_key) == (old_key, new_key):
                    file.key, file.next_key = new_key, None
                    uploads = checkpoint.params.get("multipart_upload")
                    if isinstance(uploads, dict) and isinstance(uploads.get(file.name), dict):
                        moved = uploads | {file.name: uploads[file.name] | {"key": new_key}}
                        checkpoint.params = checkpoint.params | {"multipart_upload": moved}
                    arguments = {"checkpoint_id": str(checkpoint_id), "key": old_key}
                    await self._chores.defer(session, REMOVE_OBJECT, str(checkpoint_id), arguments, wait=keep)
                    return True
            return False

    async def find_stale_uploads(self, before: datetime) -> list[Checkpoint]:
        """Uploads that were opened before then and are not finished."""
        unset = [col(column).is_(None) for column in (Checkpoint.error, Checkpoint.source, Checkpoint.folder)]
        # A client may set a finished one back to Initial: that is no upload.
        of_it = col(CheckpointFile.checkpoint_id) == col(Checkpoint.id)
        is_open = sa.exists().where(of_it, ~col(CheckpointFile.complete), col(CheckpointFile.upload_id) != "")
        opened = [col(Checkpoint.status) == INITIAL, *unset, col(Checkpoint.created_at) < before]
        wanted = sa.select(Checkpoint).where(*opened, is_open)
        async with self._database.transaction() as session:
            return list((await session.execute(wanted.limit(_MAX_STALE))).scalars())

    async def save_refusal(
        self, checkpoint_id: UUID, error: str, only_open: bool = False, keeps_objects: bool = False
    ) -> None:
        """Disables a checkpoint that is refused, frees its names and, unless it keeps them, has its objects removed.

        Nothing is done for one that is gone, or with `only_open` whose uploads have ended meanwhile.
        """
        async with self._database.transaction() as session:
            checkpoint = await session.get(Checkpoint, checkpoint_id, with_for_update=True)
            if checkpoint is None or (only_open and not checkpoint.has_open_upload):
                return
            await disable(session, checkpoint, error, None if keeps_objects else self._chores, self._audit)

    async def remove_checkpoints(self, prefixes: Mapping[UUID, str], keeps_active: bool = False) -> list[UUID]:
        """Forgets the checkpoints and their files, and has all objects below their prefixes removed in the background.

        Answers those that stay: with `keeps_active` the Active ones.
        """
        wanted = sa.select(Checkpoint).where(col(Checkpoint.id).in_(prefixes)).order_by(col(Checkpoint.id))
        async with self._database.transaction() as session:
            found = (await session.execute(wanted.with_for_update())).scalars().all()
            kept = [checkpoint.id for checkpoint in found if keeps_active and checkpoint.status == ACTIVE]
            facts = {checkpoint.id: checkpoint.facts() for checkpoint in found if checkpoint.id not in kept}
            await session.execute(sa.delete(Checkpoint).where(col(Checkpoint.id).in_(facts)))
            for checkpoint_id, prefix in prefixes.items():
                if checkpoint_id not in kept:
                    await self._chores.defer(session, REMOVE_OBJECTS, prefix, {"prefix": prefix})
            for checkpoint_id, before in facts.items():
                await self._audit.record(session, "checkpoint.delete", str(checkpoint_id), before=before)
            return kept


async def used_name(session: AsyncSession, names: Sequence[str]) -> str | None:
    """One of the names that is in use."""
    wanted = sa.select(col(CheckpointFile.name)).where(
        col(CheckpointFile.reserved), col(CheckpointFile.name).in_(names)
    )
    return (await session.execute(wanted.limit(1))).scalar()


async def disable(
    session: AsyncSession, checkpoint: Checkpoint, error: str, chores: Chores | None, audit: Audit
) -> None:
    """Ends a locked checkpoint with a reason, frees its names, and has its objects removed by one of the chores."""
    before = checkpoint.facts()
    checkpoint.status, checkpoint.error = DISABLED, error
    checkpoint.params = checkpoint.params | {"error": error}
    for file in checkpoint.files:
        file.reserved = False
    if chores:
        await chores.defer(session, REMOVE_REFUSED, str(checkpoint.id), {"checkpoint_id": str(checkpoint.id)})
    await audit.record(session, "checkpoint.refuse", str(checkpoint.id), before, checkpoint.facts())


async def _locked(session: Any, checkpoint_id: UUID) -> Checkpoint:
    checkpoint: Checkpoint | None = await session.get(Checkpoint, checkpoint_id, with_for_update=True)
    if checkpoint is None:
        raise CheckpointNotFound(checkpoint_id)
    return checkpoint


def _merge(params: dict[str, Any], name: str, found: dict[str, Any]) -> dict[str, Any]:
    """Params with `{word: {name: value}}` for each word found. A client's own value of that word gives way."""
    merged = dict(params)
    for word, value in found.items():
        kept = merged.get(word)
        merged[word] = {**(kept if isinstance(kept, dict) else {}), name: value}
    return merged


def page_statement(filters: Filters, page: int, per_page: int) -> sa.Select[Checkpoint]:
    """The checkpoints of a page, newest first."""
    newest = col(Checkpoint.created_at).desc(), col(Checkpoint.id).desc()
    rows = sa.select(Checkpoint).where(*_conditions(filters)).order_by(*newest)
    return rows.limit(per_page).offset((page - 1) * per_page)


def count_statement(filters: Filters) -> sa.Select[int]:
    """How many checkpoints there are, from the table that triggers keep: counting 100,000 rows takes too long."""
    num = sa.cast(sa.func.coalesce(sa.func.sum(CheckpointCount.num), 0), sa.BigInteger)
    return sa.select(num).where(*_conditions(filters, CheckpointCount))


def _conditions(
    filters: Filters, table: type[Checkpoint | CheckpointCount] = Checkpoint
) -> list[sa.ColumnElement[bool]]:
    conditions: list[sa.ColumnElement[bool]] = []
    owners = col(table.owners)
    for viewer in filters.viewers:
        if not viewer.sees_everything:
            mine = _texts(viewer.owner_words)
            conditions.append(sa.or_(owners.op("&&")(mine), owners == sa.cast([], ARRAY(sa.Text))))
    if filters.statuses:
        conditions.append(col(table.status).in_(filters.statuses))
    if filters.types:
        conditions.append(col(table.type).in_(filters.types))
    if filters.owners:
        conditions.append(owners.op("&&")(_texts(filters.owners)))
    return conditions


def _texts(values: Any) -> sa.ColumnElement[Any]:
    return sa.cast(list(values), ARRAY(sa.Text))
