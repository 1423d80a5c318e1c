"""Decides who a key or a secret stands for, and signs that as a token.

The gateway asks for a user's token at every request, so they are kept in memory while at least ten seconds of their
life remain, and all are forgotten when any key, user or role changes. So is what a review found of open streams, which
may be thousands every two seconds. An unknown key is looked up every time.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

from services.common.auth import AUDIENCE_SERVICES, Caller, Kind, Profile, Signer, UsernameStatus, Verifier
from services.common.errors import Unauthenticated
from services.identity.keys import is_mistyped
from services.identity.rows import KeyUse
from services.identity.store import IdentityStore

USER_TOKEN_SECONDS = 30
SECRET_TOKEN_SECONDS = 300
_KEEP_SECONDS = 20.0
_MAX_KEPT = 10_000
MAX_NAME_BYTES = 255  # as UTF-8, of a user's or role's name
UNREADABLE_NAME = ""  # in the place of a name that a request holds in a form that cannot be read
_CREDENTIAL_DIGITS = 16

_AUDIENCES = {Kind.SERVICE: AUDIENCE_SERVICES, Kind.WORKER: "inference", Kind.TRAINER: "training"}


def sha256(value: str) -> str:
    """The stored form of a key or secret: they are random and long, so a fast hash is right for them."""
    return hashlib.sha256(value.encode()).hexdigest()


@dataclass(frozen=True)
class _Kept:
    token: str
    until: float
    key_id: UUID


class Tokens:
    """Makes tokens. `service_hashes` maps the SHA-256 of each service's secret to the service's name.

    `used` is called with the id of a key at each request that the key opens.
    """

    def __init__(
        self,
        store: IdentityStore,
        signer: Signer,
        verifier: Verifier,
        service_hashes: dict[str, str],
        used: Callable[[UUID], None],
    ) -> None:
        self._store = store
        self._signer = signer
        self._verifier = verifier
        self._service_hashes = service_hashes
        self._used = used
        self._kept: dict[tuple[str, str | None, Profile], _Kept] = {}
        self._holding: dict[str, float] = {}  # users' tokens that hold, and until when that needs no look
        self._generation = 0

    def forget(self) -> None:
        """Drops every kept token, also those that are being made from rows read before now."""
        self._kept.clear()
        self._holding.clear()
        self._generation += 1

    async def of_key(self, key: str, username: str | None, profile: Profile) -> str | None:
        """A token for a request with this API key that names this user (None: nobody); None for a key that is
        unknown, revoked or over.

        Raises:
            Unavailable: the database does not answer.
        """
        if is_mistyped(key):
            return None
        key_hash = sha256(key)
        if username is not None:
            username = username[: MAX_NAME_BYTES + 1]  # still nobody's name, and short enough for a header
        kept = self._kept.get((key_hash, username, profile))
        if kept is not None and kept.until > time.monotonic():
            self._used(kept.key_id)
            return kept.token
        generation = self._generation
        use = await self._store.find_key_use(key_hash, _possible(username))
        if use is None:
            return None
        self._used(use.key_id)
        caller = _acting(use, username, profile)
        signed_at = time.monotonic()
        seconds_left = USER_TOKEN_SECONDS if use.seconds_left is None else use.seconds_left
        lifetime_seconds = max(1, min(USER_TOKEN_SECONDS, int(seconds_left)))
        token = self._signer.sign(caller, AUDIENCE_SERVICES, lifetime_seconds)
        if generation == self._generation:
            if len(self._kept) >= _MAX_KEPT:
                self._kept.clear()
            # `iat` is cut to whole seconds, so up to one second of life is gone already. A token whose life the key's
            # end cuts short is not worth keeping.
            keep_seconds = _KEEP_SECONDS - 1 if lifetime_seconds == USER_TOKEN_SECONDS else 0
            self._kept[key_hash, username, profile] = _Kept(token, signed_at + keep_seconds, use.key_id)
        return token

    async def holds(self, token: str) -> bool:
        """Whether the token, which may be over, would be made the same now.

        Raises:
            Unavailable: the database does not answer.
        """
        if self._holding.get(token, 0.0) > time.monotonic():
            return True
        try:
            caller = self._verifier.read(token)
        except Unauthenticated:
            return False
        if caller.kind == Kind.USER:
            username = None if caller.username_status == UsernameStatus.ABSENT else caller.name
            generation = self._generation
            use = await self._store.find_key_use(UUID(caller.credential), _possible(username))
            if use is None or _acting(use, username, caller.profile) != caller:
                return False
            if generation == self._generation:
                if len(self._holding) >= _MAX_KEPT:
                    self._holding.clear()
                seconds = _KEEP_SECONDS if use.seconds_left is None else min(_KEEP_SECONDS, use.seconds_left)
                self._holding[token] = time.monotonic() + seconds
            return True
        if caller.kind == Kind.SERVICE:
            return any(_holder(caller.kind, name, of) == caller for of, name in self._service_hashes.items())
        secret = await self._store.get_secret(str(caller.kind), caller.name)
        return secret is not None and _holder(caller.kind, secret.subject, secret.secret_hash) == caller

    async def of_secret(self, secret: str) -> str:
        """A token for the service, the workers or the trainer whose secret this is.

        Raises:
            Unauthenticated: nobody's.
            Unavailable: the database does not answer.
        """
        secret_hash = sha256(secret)
        if service := self._service_hashes.get(secret_hash):
            caller = _holder(Kind.SERVICE, service, secret_hash)
        elif found := await self._store.find_secret(secret_hash):
            caller = _holder(Kind(found.kind), found.subject, secret_hash)
        else:
            raise Unauthenticated("the secret is not known")
        return self._signer.sign(caller, _AUDIENCES[caller.kind], SECRET_TOKEN_SECONDS)


def _possible(username: str | None) -> str | None:
    """The name for a query: one that no user can have is not worth it, and PostgreSQL would not take it."""
    return username if username is None or is_name(username) else None


def is_name(text: str) -> bool:
    """Whether the text can be the name of a user or role."""
    return 1 <= len(text.encode()) <= MAX_NAME_BYTES and "\0" not in text


def _acting(use: KeyUse, username: str | None, profile: Profile) -> Caller:
    unknown = use.roles is None or _possible(username) is None
    if username is not None and (unknown or (username != use.owner and not use.impersonate)):
        return _nobody(use, username, profile)
    return Caller(
        kind=Kind.USER,
        name=username or use.owner,
        roles=use.roles or [],
        permissions=use.permissions,
        profile=profile,
        username_status=UsernameStatus.NAMED if username else UsernameStatus.ABSENT,
        impersonate=use.impersonate,
        key_owner=use.owner,
        credential=str(use.key_id),
    )


def _nobody(use: KeyUse, username: str, profile: Profile) -> Caller:
    """Somebody who does not exist, or whom the key may not act for: that is said first, whether they exist or not."""
    status = UsernameStatus.UNKNOWN if use.impersonate else UsernameStatus.FOREIGN
    if username == UNREADABLE_NAME:
        status = UsernameStatus.UNREADABLE
    return Caller(Kind.USER, username, [], [], profile, status, use.impersonate, use.owner, str(use.key_id))


def _holder(kind: Kind, name: str, secret_hash: str) -> Caller:
    return Caller(kind, name, credential=secret_hash[:_CREDENTIAL_DIGITS])
