"""Decides about users, roles, keys and secrets: who sees, writes and grants what (contract 3)."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

from services.common.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from services.identity.keys import new_api_key, shown_prefix
from services.identity.passwords import Passwords
from services.identity.rows import ApiKey, Role, Secret, User
from services.identity.store import IdentityStore
from services.identity.tokens import MAX_NAME_BYTES, is_name, sha256

RESOURCES = ("train", "checkpoint", "inference", "sagemaker_endpoint", "user", "role")
ALL_PERMISSIONS = [f"{resource}:all" for resource in RESOURCES]
# `list` and `create` are of an older version, and still accepted.
KNOWN_PERMISSIONS = [f"{resource}:{action}" for resource in RESOURCES for action in ("all", "list", "create")]
ADMINISTRATORS = "IT Operator"
DEFAULT_ROLES = [ADMINISTRATORS, "byoc"]
INSTALLER = "ESD"  # the creator of what the first start made
FIRST_USER = "api"

_STARTER = "endpoints"  # the service that starts workers and trainers, and it alone makes their secrets


@dataclass(frozen=True)
class Actor:
    """Whoever asks; `may_impersonate` tells whether the API key may act for others, `key_owner` whose it is."""

    name: str
    permissions: list[str]
    roles: list[str]
    may_impersonate: bool = False
    key_owner: str = ""

    def covers(self, permission: str) -> bool:
        """Whether they hold this permission, or all of its resource."""
        return permission in self.permissions or f"{permission.split(':', maxsplit=1)[0]}:all" in self.permissions


@dataclass(frozen=True)
class UserView:
    """A user as others may see one. `password` is clear text where that was asked for."""

    username: str
    roles: list[str]
    creator: str
    permissions: list[str]
    has_password: bool
    password: str | None = None


@dataclass(frozen=True)
class NewKey:
    """An API key in the one moment in which its value is known."""

    key: ApiKey
    value: str


class Identity:
    """The rules. `changed` is called after every change of what a key may do."""

    def __init__(self, store: IdentityStore, passwords: Passwords, changed: Callable[[], None]) -> None:
        self._store = store
        self._passwords = passwords
        self._changed = changed

    async def bootstrap(self, first_key: str) -> None:
        """Makes the default roles where they are missing, and the first user with a key that was never there before.

        What is there stays as it is.
        """
        roles = [Role(role_name=name, creator=INSTALLER, permissions=ALL_PERMISSIONS) for name in DEFAULT_ROLES]
        user = User(username=FIRST_USER, roles=[ADMINISTRATORS], creator=INSTALLER)
        key = ApiKey(key_hash=sha256(first_key), owner=FIRST_USER, impersonate=True, prefix=shown_prefix(first_key))
        await self._store.bootstrap(roles, user, key)

    async def list_roles(self, actor: Actor, name: str | None) -> list[Role]:
        """The roles that the actor may see, by name descending."""
        roles = await self._store.find_roles(None if name is None else [_name("role", name)])
        if "role:all" not in actor.permissions:
            roles = [role for role in roles if role.creator == actor.name or role.role_name in actor.roles]
        return sorted(roles, key=lambda role: role.role_name, reverse=True)

    async def create_role(self, actor: Actor, name: str, permissions: list[str]) -> None:
        """Creates or replaces a role.

        Raises:
            InvalidArgument: a permission is not known.
            FailedPrecondition: the administrators' role would lose permissions, nobody would keep user:all, or an actor
                who may only create roles replaces somebody else's, or grants what they do not hold.
        """
        _name("role_name", name)
        for permission in permissions:
            if permission not in KNOWN_PERMISSIONS:
                known = ", ".join(KNOWN_PERMISSIONS)
                raise InvalidArgument(f'permissions: "{_short(permission)}" is not known (possible values: {known})')
        lost = [permission for permission in ALL_PERMISSIONS if permission not in permissions]
        if name == ADMINISTRATORS and lost:
            raise FailedPrecondition(f"the role {ADMINISTRATORS} cannot lose permissions: {', '.join(lost)}")
        only_of_creator = None
        if "role:all" not in actor.permissions:
            only_of_creator = actor.name
            if missing := _not_covered(actor, permissions):
                raise FailedPrecondition(
                    f"creator {actor.name} have not permission to create role with permission: [{missing}]"
                )
        role = Role(role_name=name, creator=actor.name, permissions=list(dict.fromkeys(permissions)))
        if not await self._store.save_role(role, only_of_creator):
            raise FailedPrecondition(f"creator {actor.name} not have permission to update role {name}")
        self._changed()

    async def delete_roles(self, names: list[str]) -> None:
        """Deletes roles and takes them from their holders; unknown names are skipped.

        Raises:
            InvalidArgument: the administrators' role is among them; nothing is deleted.
        """
        if ADMINISTRATORS in names:
            raise InvalidArgument("cannot delete default role")
        await self._store.remove_roles([_name("role_name_list", name) for name in names])
        self._changed()

    async def list_users(self, actor: Actor, username: str | None, reveal_passwords: bool) -> list[UserView]:
        """The users that the actor may see, by name descending.

        Whoever asks for passwords lets people log in with them, so one that is not there is shown as a text that
        nobody can know.
        """
        users = await self._store.find_users(None if username is None else _name("username", username))
        if "user:all" not in actor.permissions:
            users = [user for user in users if actor.name in (user.creator, user.username)]
        named = {name for user in users for name in user.roles}
        roles = {role.role_name: role for role in await self._store.find_roles(sorted(named))}
        views = [self._view(user, roles, reveal_passwords) for user in users]
        return sorted(views, key=lambda view: view.username, reverse=True)

    async def get_user(self, username: str) -> UserView:
        """One user, for another service.

        Raises:
            NotFound: there is none of this name.
        """
        users = await self._store.find_users(username) if is_name(username) else []
        if not users:
            raise NotFound(f'user "{_short(username)}" not found')
        roles = {role.role_name: role for role in await self._store.find_roles(users[0].roles)}
        return self._view(users[0], roles, reveal_password=False)

    async def create_user(self, actor: Actor, username: str, password: str, role_names: list[str]) -> None:
        """Creates or replaces a user.

        Raises:
            InvalidArgument: a role does not exist.
            PermissionDenied: a role grants what the actor does not hold.
        """
        _name("username", username)
        role_names = list(dict.fromkeys(_name("roles", name) for name in role_names))
        roles = {role.role_name: role for role in await self._store.find_roles(role_names)}
        for name in role_names:
            if name not in roles:
                raise InvalidArgument(f'user roles "{name}" not exist')
        _may_grant(actor, _union(roles.values()))
        await self._save_user(username, password, role_names, actor.name)

    async def create_administrator(self, actor: Actor | None, username: str, password: str) -> None:
        """Creates a user, or makes an existing one, an administrator made by the installer.

        `actor` is None for the WebUI client's first request, which may (contract 3.6).

        Raises:
            PermissionDenied: the actor does not hold all that an administrator does.
        """
        _name("username", username)
        if actor is not None:
            _may_grant(actor, _union(await self._store.find_roles([ADMINISTRATORS])))
        await self._save_user(username, password, [ADMINISTRATORS], INSTALLER)

    async def delete_users(self, actor: Actor, usernames: list[str]) -> None:
        """Deletes users and their keys; unknown names are skipped.

        Raises:
            FailedPrecondition: the actor is among them, or the owner of the key that they came with, or nobody would be
            left with user:all. Nobody is deleted then.
        """
        if actor.name in usernames:
            raise FailedPrecondition(f"{actor.name} cannot delete their own account")
        if actor.key_owner in usernames:  # whom all may act by, who would be locked out
            raise FailedPrecondition(
                f"{actor.key_owner} owns the API key of this request, and cannot be deleted with it"
            )
        await self._store.remove_users([_name("user_name_list", name) for name in usernames])
        self._changed()

    async def create_key(self, actor: Actor, owner: str, impersonate: bool, days: int | None) -> NewKey:
        """Makes an API key for a user, that ends after so many days (None: never).

        Raises:
            PermissionDenied: it would do more than the actor can do.
            InvalidArgument: there is no such user.
        """
        users = await self._store.find_users(_name("username", owner))
        if not users:
            raise InvalidArgument(f'username: user "{owner}" not exist')
        if impersonate and not actor.may_impersonate:
            raise PermissionDenied("only with a key that may act for others can one make another such key")
        permissions = _union(await self._store.find_roles(users[0].roles))
        _may_grant(actor, [*permissions, *ALL_PERMISSIONS] if impersonate else permissions)
        value = new_api_key()
        now = datetime.now(UTC)
        key = ApiKey(
            key_hash=sha256(value),
            owner=owner,
            impersonate=impersonate,
            prefix=shown_prefix(value),
            created_at=now,
            expires_at=None if days is None else now + timedelta(days=days),
        )
        if not await self._store.add_key(key):
            raise InvalidArgument(f'username: user "{owner}" not exist')
        self._changed()
        return NewKey(key, value)

    async def list_keys(self, owner: str | None) -> list[ApiKey]:
        """The keys of one user or of all, newest first; those that have ended too, but not those revoked."""
        return await self._store.find_keys(None if owner is None else _name("username", owner))

    async def delete_keys(self, key_ids: list[str]) -> None:
        """Revokes keys for good; unknown ids are skipped."""
        known = []
        for key_id in key_ids:
            with contextlib.suppress(ValueError):
                known.append(UUID(key_id))
        await self._store.revoke_keys(known)
        self._changed()

    async def create_secret(self, service: str, kind: str, subject: str) -> str:
        """Makes the secret of an endpoint's workers or of a trainer, in place of an earlier one.

        Raises:
            PermissionDenied: the service does not start such processes.
        """
        _may_keep_secrets(service)
        secret = secrets.token_urlsafe(32)
        await self._store.save_secret(Secret(kind=kind, subject=subject, secret_hash=sha256(secret)))
        return secret

    async def delete_secret(self, service: str, kind: str, subject: str) -> None:
        """Forgets a secret, if there is one.

        Raises:
            PermissionDenied: the service does not start such processes.
        """
        _may_keep_secrets(service)
        await self._store.remove_secret(kind, subject)

    async def _save_user(self, username: str, password: str, roles: list[str], creator: str) -> None:
        stored = await self._passwords.store(password)
        user = User(
            username=username,
            roles=roles,
            creator=creator,
            password_hash=stored.hash,
            password_encrypted=stored.encrypted,
        )
        await self._store.save_user(user)
        self._changed()

    def _view(self, user: User, roles: dict[str, Role], reveal_password: bool) -> UserView:
        password = None
        if reveal_password:
            password = self._passwords.reveal(user.password_encrypted) if user.password_encrypted else None
            password = password or secrets.token_urlsafe(32)
        permissions = _union(roles[name] for name in user.roles if name in roles)
        return UserView(user.username, user.roles, user.creator, permissions, user.password_hash is not None, password)


def _union(roles: Iterable[Role]) -> list[str]:
    return sorted({permission for role in roles for permission in role.permissions})


def _not_covered(actor: Actor, permissions: list[str]) -> str | None:
    return next((permission for permission in permissions if not actor.covers(permission)), None)


def _may_grant(actor: Actor, permissions: list[str]) -> None:
    if missing := _not_covered(actor, permissions):
        raise PermissionDenied(f"creator has no permission to assign permission [{missing}] to others")


def _may_keep_secrets(service: str) -> None:
    if service != _STARTER:
        raise PermissionDenied(f"the {service} service starts neither workers nor trainers, and makes no secrets")


def _name(field: str, name: str) -> str:
    """The name, when it can be one of a user or role.

    Raises:
        InvalidArgument: it is too long.
    """
    if (length := len(name.encode())) > MAX_NAME_BYTES:
        bounds = f"length: {length} bytes, maximum allowed: {MAX_NAME_BYTES}"
        raise InvalidArgument(f'[{field}: string "{_short(name)}" is too long ({bounds})]')
    return name


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}…"
