"""The rows of checkpoints and their files."""

# No `from __future__ import annotations`: SQLModel reads the relationship's annotation at run time.

from datetime import datetime
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlmodel import Field, Relationship, SQLModel

INITIAL, ACTIVE, DISABLED = "Initial", "Active", "Disabled"
STATUSES = (INITIAL, ACTIVE, DISABLED)


class CheckpointFile(SQLModel, table=True):
    """One file. `next_key` is where its object goes while it is being renamed.

    `upload_id` is empty while the object waits to be looked at. `size_bytes` and `sha256` (hex) are known once it is
    complete.
    """

    __tablename__ = "checkpoint_files"

    checkpoint_id: UUID = Field(foreign_key="checkpoints.id", primary_key=True)
    position: int = Field(primary_key=True)
    name: str
    key: str
    upload_id: str
    parts_number: int
    complete: bool = False
    reserved: bool = True
    size_bytes: int = Field(default=0, sa_type=sa.BigInteger)
    sha256: str = ""
    next_key: str | None = None


class Checkpoint(SQLModel, table=True):
    """Files that belong together. `owners` are role names, usernames or `*`; `error` says why it was refused.

    `source` is the URL, without its query, of an imported one; `folder` is where the objects of a trained one are.
    """

    __tablename__ = "checkpoints"

    id: UUID = Field(primary_key=True)
    type: str
    status: str = INITIAL
    owners: list[str] = Field(sa_type=ARRAY(sa.Text))
    created_at: datetime = Field(sa_type=sa.DateTime(timezone=True))
    params: dict[str, Any] = Field(sa_type=JSONB)
    error: str | None = None
    source: str | None = None
    folder: str | None = None
    files: list[CheckpointFile] = Relationship(
        sa_relationship_kwargs={
            "lazy": "selectin",
            "order_by": "CheckpointFile.position",
            "cascade": "all, delete-orphan",
            "passive_deletes": True,
        }
    )

    @property
    def names(self) -> list[str]:
        """The names of the files, in the order of the request."""
        return [file.name for file in self.files]

    @property
    def is_unfinished(self) -> bool:
        """Whether it waits for files, or for the first of them to have a name."""
        return self.status == INITIAL and not self.has_all_files

    @property
    def has_open_upload(self) -> bool:
        """Whether it waits for a client to finish an upload."""
        return self.status == INITIAL and any(file.upload_id and not file.complete for file in self.files)

    @property
    def has_all_files(self) -> bool:
        """Whether each is in the object store, looked at and found good."""
        return bool(self.files) and all(file.complete for file in self.files)

    def facts(self) -> dict[str, Any]:
        """What the audit may know. Params are left out: clients put there what they like."""
        files = {
            file.name: {"complete": file.complete, "size": file.size_bytes, "sha256": file.sha256}
            for file in self.files
        }
        facts = self.model_dump(include={"type", "status", "owners", "error", "source"})
        return facts | {"files": files}


class CheckpointCount(SQLModel, table=True):
    """How many checkpoints of a type and status have these owners. Triggers keep it (migration 0006)."""

    __tablename__ = "checkpoint_counts"

    owners_md5: str = Field(primary_key=True)
    type: str = Field(primary_key=True)
    status: str = Field(primary_key=True)
    owners: list[str] = Field(sa_type=ARRAY(sa.Text))
    num: int = Field(sa_type=sa.BigInteger)
