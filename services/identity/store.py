"""Remembers users, roles, API keys and secrets. Of keys and secrets only the SHA-256 is ever stored.

One method is one transaction. Whatever changes what a key may do notifies `CHANGED`, so that every replica forgets the
tokens that it keeps.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import Field, SQLModel, col, select

from services.common.database import Database, notify
from services.common.errors import FailedPrecondition

CHANGED = "identity_changed"
# Held by whatever may take user:all from somebody, so that two of them do not take it from the last two holders.
_ADMINISTRATORS_LOCK = 0x75736572


class LastAdministrator(FailedPrecondition):
    """Nobody would be left who may manage users."""

    def __init__(self) -> None:
        super().__init__("at least one user must keep the permission user:all")


class Role(SQLModel, table=True):
    """A named set of permissions."""

    __tablename__ = "roles"

    role_name: str = Field(primary_key=True)
    creator: str
    permissions: list[str] = Field(sa_type=ARRAY(sa.Text))


class User(SQLModel, table=True):
    """Somebody who acts. `roles` may name roles since deleted. Both passwords are None for a user without one."""

    __tablename__ = "users"

    username: str = Field(primary_key=True)
    roles: list[str] = Field(sa_type=ARRAY(sa.Text))
    creator: str
    password_hash: str | None = None
    password_encrypted: str | None = None


class ApiKey(SQLModel, table=True):
    """A key of a user; with `impersonate` it may act for any other.

    `prefix` is what may be shown of it. A revoked one stays as a row: the first key must not come back at a restart.
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


class Secret(SQLModel, table=True):
    """The secret of an endpoint's workers or of a trainer; `kind` is `worker` or `trainer`."""

    __tablename__ = "secrets"

    kind: str = Field(primary_key=True)
    subject: str = Field(primary_key=True)
    secret_hash: str


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


_KEY_USE = sa.text(
    """
    SELECT k.id, CAST(extract(epoch FROM k.expires_at - now()) AS float), k.owner, k.impersonate, u.roles,
           ARRAY(SELECT DISTINCT p FROM roles r, unnest(r.permissions) p WHERE r.role_name = ANY (u.roles) ORDER BY p)
    FROM api_keys k LEFT JOIN users u ON u.username = coalesce(CAST(:username AS text), k.owner)
    WHERE k.key_hash = :key_hash AND k.revoked_at IS NULL AND (k.expires_at IS NULL OR k.expires_at > now())
    """
)


_HAS_ADMINISTRATOR = sa.text(
    """
    SELECT EXISTS (SELECT FROM users u JOIN roles r ON r.role_name = ANY (u.roles)
                   WHERE 'user:all' = ANY (r.permissions))
    """
)


class IdentityStore:
    """The tables of the identity service. Every method raises Unavailable while the database does not answer."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def bootstrap(self, roles: list[Role], user: User, key: ApiKey) -> None:
        """Adds what is missing of these; replicas may do so at the same time. A key that was revoked stays so."""
        async with self._database.transaction() as session:
            for role in roles:
                await session.execute(insert(Role).values(role.model_dump()).on_conflict_do_nothing())
            await session.execute(insert(User).values(user.model_dump()).on_conflict_do_nothing())
            await session.execute(insert(ApiKey).values(key.model_dump()).on_conflict_do_nothing())
            await notify(session, CHANGED, "")

    async def find_key_use(self, key_hash: str, username: str | None) -> KeyUse | None:
        """The key and the user named with it (None: its owner); None when there is no such key."""
        async with self._database.transaction() as session:
            found = await session.execute(_KEY_USE, {"key_hash": key_hash, "username": username})
            row = found.one_or_none()
            return None if row is None else KeyUse(*row)

    async def find_roles(self, names: list[str] | None = None) -> list[Role]:
        """The roles of these names, or all, in no particular order."""
        query = select(Role)
        if names is not None:
            query = query.where(col(Role.role_name).in_(names))
        async with self._database.transaction() as session:
            return list((await session.execute(query)).scalars())

    async def save_role(self, role: Role, only_of_creator: str | None) -> bool:
        """Adds or replaces a role; False, and nothing done, when it exists and is not of the creator demanded.

        Raises:
            LastAdministrator.
        """
        statement = insert(Role).values(role.model_dump())
        update = statement.on_conflict_do_update(
            index_elements=["role_name"],
            set_={"creator": statement.excluded.creator, "permissions": statement.excluded.permissions},
            where=None if only_of_creator is None else col(Role.creator) == only_of_creator,
        )
        async with self._guarding_administrators() as session:
            saved = (await session.execute(update.returning(col(Role.role_name)))).one_or_none() is not None
            await notify(session, CHANGED, "")
            return saved

    async def remove_roles(self, names: list[str]) -> None:
        """Removes roles and takes them from all users; unknown names are skipped.

        Raises:
            LastAdministrator.
        """
        kept = "ARRAY(SELECT r FROM unnest(roles) WITH ORDINALITY AS t (r, n) WHERE NOT r = ANY (:names) ORDER BY n)"
        strip = sa.text(f"UPDATE users SET roles = {kept} WHERE roles && :names")  # noqa: S608 - a constant
        names_of_text = sa.bindparam("names", names, ARRAY(sa.Text))
        async with self._guarding_administrators() as session:
            await session.execute(strip.bindparams(names_of_text))
            await session.execute(sa.delete(Role).where(col(Role.role_name).in_(names)))
            await notify(session, CHANGED, "")

    async def find_users(self, username: str | None = None) -> list[User]:
        """The user of this name, or all, in no particular order."""
        query = select(User) if username is None else select(User).where(col(User.username) == username)
        async with self._database.transaction() as session:
            return list((await session.execute(query)).scalars())

    async def save_user(self, user: User) -> None:
        """Adds or replaces a user; the user's keys stay.

        Raises:
            LastAdministrator.
        """
        values: dict[str, Any] = user.model_dump()
        others = {name: value for name, value in values.items() if name != "username"}
        statement = insert(User).values(values)
        async with self._guarding_administrators() as session:
            await session.execute(statement.on_conflict_do_update(index_elements=["username"], set_=others))
            await notify(session, CHANGED, "")

    async def remove_users(self, usernames: list[str]) -> None:
        """Removes users and, by the foreign key, their API keys; unknown names are skipped.

        Raises:
            LastAdministrator.
        """
        async with self._guarding_administrators() as session:
            await session.execute(sa.delete(User).where(col(User.username).in_(usernames)))
            await notify(session, CHANGED, "")

    async def add_key(self, key: ApiKey) -> bool:
        """Adds a key; False when its owner does not exist."""
        owner = select(User.username).where(col(User.username) == key.owner).with_for_update(read=True, key_share=True)
        async with self._database.transaction() as session:
            if (await session.execute(owner)).one_or_none() is None:
                return False
            await session.execute(insert(ApiKey).values(key.model_dump()))
            await notify(session, CHANGED, "")
            return True

    async def find_keys(self, owner: str | None = None) -> list[ApiKey]:
        """The keys that are not revoked, of one user or of all, newest first."""
        query = select(ApiKey).where(col(ApiKey.revoked_at).is_(None))
        if owner is not None:
            query = query.where(col(ApiKey.owner) == owner)
        newest = col(ApiKey.created_at).desc(), col(ApiKey.id)
        async with self._database.transaction() as session:
            return list((await session.execute(query.order_by(*newest))).scalars())

    async def revoke_keys(self, key_ids: Sequence[UUID]) -> None:
        """Ends keys for good; unknown ones are skipped."""
        known = col(ApiKey.id).in_(key_ids), col(ApiKey.revoked_at).is_(None)
        async with self._database.transaction() as session:
            await session.execute(sa.update(ApiKey).where(*known).values(revoked_at=sa.func.now()))
            await notify(session, CHANGED, "")

    async def save_key_uses(self, key_ids: Sequence[UUID]) -> None:
        """Notes that the keys are used now, where the last note of any replica is a minute old."""
        last = col(ApiKey.last_used_at)
        due = sa.or_(last.is_(None), last < sa.func.now() - sa.text("interval '1 minute'"))
        async with self._database.transaction() as session:
            await session.execute(
                sa.update(ApiKey).where(col(ApiKey.id).in_(key_ids), due).values(last_used_at=sa.func.now())
            )

    async def find_secret(self, secret_hash: str) -> Secret | None:
        """Whose secret this is."""
        async with self._database.transaction() as session:
            found = await session.execute(select(Secret).where(col(Secret.secret_hash) == secret_hash))
            return found.scalar_one_or_none()

    async def save_secret(self, secret: Secret) -> None:
        """Adds or replaces the secret of a subject."""
        statement = insert(Secret).values(secret.model_dump())
        replace = statement.on_conflict_do_update(
            index_elements=["kind", "subject"], set_={"secret_hash": secret.secret_hash}
        )
        async with self._database.transaction() as session:
            await session.execute(replace)

    async def remove_secret(self, kind: str, subject: str) -> None:
        """Removes the secret of a subject, if there is one."""
        async with self._database.transaction() as session:
            await session.execute(sa.delete(Secret).where(col(Secret.kind) == kind, col(Secret.subject) == subject))

    @asynccontextmanager
    async def _guarding_administrators(self) -> AsyncIterator[AsyncSession]:
        """A transaction that is undone where it leaves nobody with user:all, as it found somebody.

        Raises:
            LastAdministrator.
        """
        async with self._database.transaction() as session:
            await session.execute(sa.select(sa.func.pg_advisory_xact_lock(_ADMINISTRATORS_LOCK)))
            had_one = (await session.execute(_HAS_ADMINISTRATOR)).scalar_one()
            yield session
            if had_one and not (await session.execute(_HAS_ADMINISTRATOR)).scalar_one():
                raise LastAdministrator
