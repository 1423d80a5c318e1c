"""Remembers users, roles, API keys and secrets. Of keys and secrets only the SHA-256 is ever stored.

One method is one transaction. Whatever changes what a key may do notifies `CHANGED`, so that every replica forgets the
tokens that it keeps; all but the last use of keys is written to the audit.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from services.common.audit import HIDDEN, Audit
from services.common.database import Database, notify
from services.common.errors import FailedPrecondition
from services.identity.rows import ApiKey, KeyUse, Role, Secret, User

CHANGED = "identity_changed"
# Held by whatever may take user:all from somebody, so that two of them do not take it from the last two holders.
_ADMINISTRATORS_LOCK = 0x75736572


class LastAdministrator(FailedPrecondition):
    """Nobody would be left who may manage users."""

    def __init__(self) -> None:
        super().__init__("at least one user must keep the permission user:all")


_KEY_USE = sa.text(
    """
    SELECT k.id, CAST(extract(epoch FROM k.expires_at - now()) AS float), k.owner, k.impersonate, u.roles,
           ARRAY(SELECT DISTINCT p FROM roles r, unnest(r.permissions) p WHERE r.role_name = ANY (u.roles) ORDER BY p)
    FROM api_keys k JOIN users o ON o.username = k.owner
         LEFT JOIN users u ON u.username = coalesce(CAST(:username AS text), k.owner)
    WHERE (k.key_hash = :key_hash OR k.id = CAST(:key_id AS uuid))
      AND k.revoked_at IS NULL AND (k.expires_at IS NULL OR k.expires_at > now())
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

    def __init__(self, database: Database, audit: Audit) -> None:
        self._database = database
        self._audit = audit

    async def bootstrap(self, roles: list[Role], user: User, key: ApiKey) -> None:
        """Adds what is missing of these; replicas may do so at the same time.

        A key that was revoked stays so. The user comes with a key that was never there before: one who was deleted
        does not come back at the next start.
        """
        async with self._database.transaction() as session:
            made: list[tuple[str, str, Role | User | ApiKey]] = [
                ("role.create", role.role_name, role) for role in roles if await _is_added(session, role)
            ]
            if await _is_added(session, key):
                if await _is_added(session, user):
                    made.append(("user.create", user.username, user))
                made.append(("key.create", str(key.id), key))
            await notify(session, CHANGED, "")
            for action, target, row in made:
                await self._audit.record(session, action, target, after=row.facts())

    async def find_key_use(self, key: str | UUID, username: str | None) -> KeyUse | None:
        """The key of this hash or id, and the user named with it (None: its owner); None when there is no such key."""
        wanted = {"key_id": key, "key_hash": None} if isinstance(key, UUID) else {"key_id": None, "key_hash": key}
        async with self._database.transaction() as session:
            found = await session.execute(_KEY_USE, {**wanted, "username": username})
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
            before = await session.get(Role, role.role_name)
            facts = before.facts() if before else None
            if (await session.execute(update.returning(col(Role.role_name)))).one_or_none() is None:
                return False
            await notify(session, CHANGED, "")
            action = "role.update" if before else "role.create"
            await self._audit.record(session, action, role.role_name, facts, role.facts())
            return True

    async def remove_roles(self, names: list[str]) -> None:
        """Removes roles and takes them from all users; unknown names are skipped.

        Raises:
            LastAdministrator.
        """
        kept = "ARRAY(SELECT r FROM unnest(roles) WITH ORDINALITY AS t (r, n) WHERE NOT r = ANY (:names) ORDER BY n)"
        strip = sa.text(f"UPDATE users SET roles = {kept} WHERE roles && :names")  # noqa: S608 - a constant
        names_of_text = sa.bindparam("names", names, ARRAY(sa.Text))
        holders = select(User.username, User.roles).where(col(User.roles).op("&&")(names_of_text))
        async with self._guarding_administrators() as session:
            held = (await session.execute(holders.order_by(User.username))).all()
            await session.execute(strip.bindparams(names_of_text))
            removed = sa.delete(Role).where(col(Role.role_name).in_(names)).returning(Role)
            facts = {role.role_name: role.facts() for role in (await session.execute(removed)).scalars()}
            await notify(session, CHANGED, "")
            for name in dict.fromkeys(names):
                lost = {"holders": [username for username, roles in held if name in roles] or None}
                await self._audit.record(session, "role.delete", name, before=facts.get(name, {}) | lost)

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
            before = await session.get(User, user.username)
            facts = before.facts() if before else None
            await session.execute(statement.on_conflict_do_update(index_elements=["username"], set_=others))
            await notify(session, CHANGED, "")
            action = "user.update" if before else "user.create"
            await self._audit.record(session, action, user.username, facts, user.facts() | {"password": HIDDEN})

    async def remove_users(self, usernames: list[str]) -> None:
        """Removes users and revokes their API keys; unknown names are skipped.

        Raises:
            LastAdministrator.
        """
        owned = col(ApiKey.owner).in_(usernames), col(ApiKey.revoked_at).is_(None)
        revoke = (
            sa.update(ApiKey)
            .where(*owned)
            .values(revoked_at=sa.func.now())
            .returning(col(ApiKey.owner), col(ApiKey.id))
        )
        async with self._guarding_administrators() as session:
            # Their rows first: from then on nobody adds a key of theirs.
            found = select(User).where(col(User.username).in_(usernames)).order_by(User.username).with_for_update()
            facts = {user.username: user.facts() for user in (await session.execute(found)).scalars()}
            keys = (await session.execute(revoke)).all()
            await session.execute(sa.delete(User).where(col(User.username).in_(usernames)))
            await notify(session, CHANGED, "")
            for username, before in facts.items():
                lost = {"keys": sorted(str(key_id) for owner, key_id in keys if owner == username) or None}
                await self._audit.record(session, "user.delete", username, before=before | lost)

    async def add_key(self, key: ApiKey) -> bool:
        """Adds a key; False when its owner does not exist."""
        owner = select(User.username).where(col(User.username) == key.owner).with_for_update(read=True, key_share=True)
        async with self._database.transaction() as session:
            if (await session.execute(owner)).one_or_none() is None:
                return False
            await session.execute(insert(ApiKey).values(key.model_dump()))
            await notify(session, CHANGED, "")
            await self._audit.record(session, "key.create", str(key.id), after=key.facts())
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
        revoke = sa.update(ApiKey).where(*known).values(revoked_at=sa.func.now()).returning(ApiKey)
        async with self._database.transaction() as session:
            revoked = list((await session.execute(revoke)).scalars())
            await notify(session, CHANGED, "")
            for key in revoked:
                await self._audit.record(session, "key.revoke", str(key.id), before=key.facts())

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

    async def get_secret(self, kind: str, subject: str) -> Secret | None:
        """The secret of a subject, if it has one."""
        async with self._database.transaction() as session:
            return await session.get(Secret, (kind, subject))

    async def save_secret(self, secret: Secret) -> None:
        """Adds or replaces the secret of a subject."""
        statement = insert(Secret).values(secret.model_dump())
        replace = statement.on_conflict_do_update(
            index_elements=["kind", "subject"], set_={"secret_hash": secret.secret_hash}
        )
        async with self._database.transaction() as session:
            await session.execute(replace)
            await self._audit.record(session, "secret.create", secret.name, after=secret.facts())

    async def remove_secret(self, kind: str, subject: str) -> None:
        """Removes the secret of a subject, if there is one."""
        remove = sa.delete(Secret).where(col(Secret.kind) == kind, col(Secret.subject) == subject).returning(Secret)
        async with self._database.transaction() as session:
            removed = (await session.execute(remove)).scalar_one_or_none()
            if removed is not None:
                await self._audit.record(session, "secret.delete", removed.name, before=removed.facts())

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


async def _is_added(session: AsyncSession, row: Role | User | ApiKey) -> bool:
    """Adds a row unless there is one with its key; says whether there was none."""
    add = insert(type(row)).values(row.model_dump()).on_conflict_do_nothing()
    return (await session.execute(add.returning(sa.literal(1)))).one_or_none() is not None
