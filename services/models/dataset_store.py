"""Remembers datasets and their files. One method is one transaction."""

# No `from __future__ import annotations`: SQLModel reads the columns' types at run time.

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, insert
from sqlmodel import Field, SQLModel, col

from services.common.audit import Audit
from services.common.database import Database
from services.common.errors import FailedPrecondition, NotFound, PermissionDenied
from services.common.times import time_text
from services.common.viewer import Viewer

INITIALED = "Initialed"
MAX_ITEMS = 10_000  # of a dataset, which is shown as a whole


class DatasetNotFound(NotFound):
    """There is no dataset of the name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"dataset {name} is not found")


class DatasetHidden(PermissionDenied):
    """The dataset is somebody else's."""

    def __init__(self) -> None:
        super().__init__("no permission to view dataset")


class DatasetNameKept(FailedPrecondition):
    """Somebody else had a dataset of the name until lately."""

    def __init__(self, name: str, until: datetime) -> None:
        super().__init__(
            f"dataset {name} was deleted, but URLs that upload into it are valid until {time_text(until)} UTC; "
            "the name is free some minutes later, until then choose another name"
        )


class DatasetEmptied(FailedPrecondition):
    """The folder of a deleted dataset of the name is being emptied."""

    def __init__(self, name: str) -> None:
        super().__init__(f"dataset {name} is being deleted; try again in a minute, or choose another name")


class DatasetFull(FailedPrecondition):
    """The dataset would have too many files."""

    def __init__(self, name: str, num_items: int) -> None:
        super().__init__(f"dataset {name} would have {num_items} files, {MAX_ITEMS} are possible")


class Dataset(SQLModel, table=True):
    """Files under one name. `prefix` is the folder of those added last; `owners` are role names, usernames or `*`."""

    __tablename__ = "datasets"

    name: str = Field(primary_key=True)
    prefix: str
    status: str = INITIALED
    owners: list[str] = Field(sa_type=ARRAY(sa.Text))
    created_at: datetime = Field(sa_type=sa.DateTime(timezone=True))
    params: dict[str, Any] = Field(sa_type=JSONB)

    def facts(self) -> dict[str, Any]:
        """What the audit may know. Params are left out: clients put there what they like."""
        return self.model_dump(include={"prefix", "status", "owners"})


class DatasetItem(SQLModel, table=True):
    """One file of a dataset. `key` is that of its object, `position` its place in the request."""

    __tablename__ = "dataset_items"

    dataset_name: str = Field(foreign_key="datasets.name", primary_key=True)
    key: str = Field(primary_key=True)
    position: int
    name: str
    type: str
    status: str = INITIALED
    created_at: datetime = Field(sa_type=sa.DateTime(timezone=True))
    params: dict[str, Any] = Field(sa_type=JSONB)


class KeptName(SQLModel, table=True):
    """The name of a deleted dataset, while no other has it.

    It is its owners' as long as they may have URLs that write into its folder, and nobody's while that is being
    emptied: by one at a time, who has until `emptying_until` for it. After that another begins anew.
    """

    __tablename__ = "kept_dataset_names"

    name: str = Field(primary_key=True)
    owners: list[str] = Field(sa_type=ARRAY(sa.Text))
    until: datetime = Field(sa_type=sa.DateTime(timezone=True))
    emptying_until: datetime | None = Field(default=None, sa_type=sa.DateTime(timezone=True))


class DatasetStore:
    """The tables of datasets."""

    def __init__(self, database: Database, audit: Audit) -> None:
        self._database = database
        self._audit = audit

    async def save_dataset(self, dataset: Dataset, items: Sequence[DatasetItem], viewer: Viewer) -> None:
        """Adds a dataset, or replaces what is known of it, but for its owners, and adds its files.

        Raises:
            DatasetHidden: there is one of the name that the viewer may not see. DatasetNameKept: there was one lately.
            DatasetEmptied: it is being deleted. DatasetFull.
        """
        values = dataset.model_dump()
        statement = insert(Dataset).values(values)
        changes = {name: value for name, value in values.items() if name not in ("name", "owners")}
        save = statement.on_conflict_do_update(index_elements=["name"], set_=changes, where=_seen_by(viewer))
        add = insert(DatasetItem).values([item.model_dump() for item in items])
        replaced = {
            name: add.excluded[name] for name in DatasetItem.model_fields if name not in ("dataset_name", "key")
        }
        async with self._database.transaction() as session:
            before = await session.get(Dataset, dataset.name, with_for_update=True)
            facts = before.facts() if before else None
            owners = (await session.execute(save.returning(col(Dataset.owners)))).scalar_one_or_none()
            if owners is None:
                raise DatasetHidden
            # Only now, when no other request can make or delete a dataset of the name any more.
            if kept := await session.get(KeptName, dataset.name, with_for_update=True):
                if not viewer.sees(kept.owners):
                    raise DatasetNameKept(kept.name, kept.until)
                if kept.emptying_until is not None:
                    raise DatasetEmptied(kept.name)
                await session.delete(kept)
            await session.execute(add.on_conflict_do_update(index_elements=["dataset_name", "key"], set_=replaced))
            of_it = sa.select(sa.func.count()).where(col(DatasetItem.dataset_name) == dataset.name)
            if (num_items := (await session.execute(of_it)).scalar_one()) > MAX_ITEMS:
                raise DatasetFull(dataset.name, num_items)
            action = "dataset.update" if before else "dataset.create"
            after = dataset.facts() | {"owners": owners, "added": [item.name for item in items]}
            await self._audit.record(session, action, dataset.name, facts, after)

    async def page_datasets(
        self, viewer: Viewer, status: str, after: tuple[datetime, str] | None, limit: int
    ) -> tuple[list[Dataset], bool]:
        """At most `limit` of the viewer's datasets of the status, newest first, after the place of another, and whether
        more follow."""
        place = sa.tuple_(col(Dataset.created_at), col(Dataset.name))
        wanted = sa.select(Dataset).where(_seen_by(viewer))
        if status:
            wanted = wanted.where(col(Dataset.status) == status)
        if after is not None:
            wanted = wanted.where(place < sa.tuple_(*map(sa.literal, after)))
        wanted = wanted.order_by(col(Dataset.created_at).desc(), col(Dataset.name).desc())
        async with self._database.transaction() as session:
            rows = (await session.execute(wanted.limit(limit + 1))).scalars().all()
        return list(rows[:limit]), len(rows) > limit

    async def get_dataset(self, name: str) -> tuple[Dataset, list[DatasetItem]]:
        """The dataset and its files, in the order in which they were added.

        Raises:
            DatasetNotFound.
        """
        wanted = sa.select(DatasetItem).where(col(DatasetItem.dataset_name) == name)
        order = col(DatasetItem.created_at), col(DatasetItem.position), col(DatasetItem.key)
        async with self._database.transaction() as session:
            dataset = await session.get(Dataset, name)
            if dataset is None:
                raise DatasetNotFound(name)
            return dataset, list((await session.execute(wanted.order_by(*order))).scalars())

    async def find_datasets(self, names: Sequence[str]) -> list[Dataset]:
        """Those of the datasets that exist."""
        async with self._database.transaction() as session:
            return list((await session.execute(sa.select(Dataset).where(col(Dataset.name).in_(names)))).scalars())

    async def save_status(self, name: str, status: str) -> None:
        """Sets the status of a dataset and of all its files.

        Raises:
            DatasetNotFound.
        """
        async with self._database.transaction() as session:
            dataset = await session.get(Dataset, name, with_for_update=True)
            if dataset is None:
                raise DatasetNotFound(name)
            before, dataset.status = dataset.facts(), status
            items = sa.update(DatasetItem).where(col(DatasetItem.dataset_name) == name)
            await session.execute(items.values(status=status))
            await self._audit.record(session, "dataset.update", name, before, dataset.facts())

    async def remove_datasets(self, names: Sequence[str], keep: timedelta, emptying: timedelta) -> list[KeptName]:
        """Forgets the datasets and their files, keeps their names for a while, and answers those, to be emptied."""
        remove = sa.delete(Dataset).where(col(Dataset.name).in_(names)).returning(Dataset)
        now = datetime.now(UTC)
        async with self._database.transaction() as session:
            removed = (await session.execute(remove)).scalars().all()
            kept = [
                KeptName(name=dataset.name, owners=dataset.owners, until=now + keep, emptying_until=now + emptying)
                for dataset in removed
            ]
            for one in kept:
                await session.merge(one)
            for dataset in removed:
                await self._audit.record(session, "dataset.delete", dataset.name, before=dataset.facts())
            return kept

    async def claim_name(self, emptying: timedelta) -> KeptName | None:
        """A kept name whose folder is to be emptied by the caller: its time is over, or somebody was cut short."""
        now = datetime.now(UTC)
        is_over = col(KeptName.emptying_until).is_(None) & (col(KeptName.until) <= now)
        due = sa.select(KeptName).where(is_over | (col(KeptName.emptying_until) <= now))
        async with self._database.transaction() as session:
            found = await session.execute(due.limit(1).with_for_update(skip_locked=True))
            kept: KeptName | None = found.scalar_one_or_none()
            if kept:
                kept.emptying_until = now + emptying
            return kept

    async def save_emptied(self, kept: KeptName, is_free: bool) -> None:
        """The folder is empty: the name is free, or its owners' for the rest of its time."""
        mine = (col(KeptName.name) == kept.name) & (col(KeptName.emptying_until) == kept.emptying_until)
        statement = sa.delete(KeptName) if is_free else sa.update(KeptName).values(emptying_until=None)
        async with self._database.transaction() as session:
            await session.execute(statement.where(mine))


def _seen_by(viewer: Viewer) -> sa.ColumnElement[bool]:
    if viewer.sees_everything:
        return sa.true()
    mine = sa.cast(viewer.owner_words, ARRAY(sa.Text))
    return col(Dataset.owners).op("&&")(mine)
