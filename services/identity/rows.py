"""The rows of users, roles, API keys and secrets. Of keys and secrets only the SHA-256 is ever stored.

`facts` is what the audit may know of a row: nothing that opens a door.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY
from sqlmodel import Field, SQLModel

from services.common.audit import HIDDEN
from services.common.times import time_text


class Role(SQLModel, table=True):
    """A named set of permissions."""

    __tablename__ = "roles"

    role_name: str = Field(primary_key=True)
    creator: str
    permissions: list[str] = Field(sa_type=ARRAY(sa.Text))

    def facts(self) -> dict[str, Any]:
        """For the audit."""
        return {"creator": self.creator, "permissions": self.permissions}


class User(SQLModel, table=True):
    """Somebody who acts. `roles` may name roles since deleted. Both passwords are None for a user without one."""

    __tablename__ = "users"

    username: str = Field(primary_key=True)
    roles: list[str] = Field(sa_type=ARRAY(sa.Text))
    creator: str
    password_hash: str | None = None
    password_encrypted: str | None = None

    def facts(self) -> dict[str, Any]:
        """For the audit."""
        return {"creator": self.creator, "roles": self.roles}


class ApiKey(SQLModel, table=True):
    """A key of a user; with `impersonate` it may act for any other.

    `prefix` is what may be shown of it. A revoked one stays as a row, also when its owner is deleted: the first key
    must not come back at a restart.
    """

    __tablename__ = "api_keys"

    id: UUID = Field(default_factory=uuid4, primary_key=True)
    key_hash: str
    owner: str
    impersonate: bool = False
    prefix: str = ""
    created_at: datetime = Field(default_factory=lambda: datetime.now(UTC), sa_type=sa.DateTime(timezone=True))
    last_used_at: datetime | None = Field(default=None, sa_type=sa.DateTime(timezone=True))
    expires_at: datetime | None = Field(default=None, sa_type=sa.DateTime(timezone=True))
    revoked_at: datetime | None = Field(default=None, sa_type=sa.DateTime(timezone=True))

    def facts(self) -> dict[str, Any]:
        """For the audit."""
        expires = time_text(self.expires_at)
        return {"owner": self.owner, "prefix": self.prefix, "impersonate": self.impersonate, "expires": expires}


class Secret(SQLModel, table=True):
    """The secret of an endpoint's workers or of a trainer; `kind` is `worker` or `trainer`."""

    __tablename__ = "secrets"

    kind: str = Field(primary_key=True)
    subject: str = Field(primary_key=True)
    secret_hash: str

    @property
    def name(self) -> str:
        """Whose it is."""
        return f"{self.kind}/{self.subject}"

    def facts(self) -> dict[str, Any]:
        """For the audit."""
        return {"secret": HIDDEN}


@dataclass(frozen=True)
class KeyUse:
    """A key and the user whom a request with it names, or its owner. `roles` is None when there is no such user.

    `seconds_left` is the key's life, None for one without an end.
    """

    key_id: UUID
    seconds_left: float | None
    owner: str
    impersonate: bool
    roles: list[str] | None
    permissions: list[str]
