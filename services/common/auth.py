"""Tokens: who is asking, and whether they may.

A token is a JWT signed by identity with EdDSA. Users' tokens are made by the gateway's ext_authz call and live for
seconds; services, workers and trainers trade their secret for one of five minutes. Every service verifies locally.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Any

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from services.common.errors import EsdError, InvalidArgument, PermissionDenied, Unauthenticated, Unavailable
from services.common.process import refuse
from services.common.settings import read_secret

TOKEN_METADATA = "x-esd-token"  # noqa: S105 - a header's name
AUDIENCE_SERVICES = "esd"
_ISSUER = "esd"
_PEM_END = "-----END PUBLIC KEY-----"


class Kind(StrEnum):
    """The kind of process or person behind a token."""

    USER = "user"
    SERVICE = "service"
    WORKER = "worker"
    TRAINER = "trainer"


class Profile(StrEnum):
    """The client profile of the gateway's listener (contract 0.15)."""

    DOCUMENT = "document"
    WEBUI = "webui"


class UsernameStatus(StrEnum):
    """What the request said about who acts."""

    NAMED = "named"  # an existing user whom the key may act for
    ABSENT = "absent"  # nobody: the key's owner acts, where the RPC and the profile allow it
    UNKNOWN = "unknown"  # a user who does not exist
    FOREIGN = "foreign"  # a user whom the key may not act for
    UNREADABLE = "unreadable"  # a legacy Authorization that is no name


class Absence(StrEnum):
    """What an RPC allows a request that names no user (`WithoutUsername` in options.proto)."""

    REFUSED_IN_WEBUI = "refused_in_webui"
    OWNER = "owner"
    ALLOWED = "allowed"


@dataclass(frozen=True)
class Caller:
    """Who is asking, as the token says. For users, `name` is the acting user, whose roles and permissions these are.

    `credential` is what the token was made from, as far as it may be told: a key's id, a secret's hash in part.
    """

    kind: Kind
    name: str
    roles: list[str] = field(default_factory=list)
    permissions: list[str] = field(default_factory=list)
    profile: Profile = Profile.DOCUMENT
    username_status: UsernameStatus = UsernameStatus.NAMED
    impersonate: bool = False
    key_owner: str = ""
    credential: str = ""

    def may(self, *permissions: str) -> bool:
        """Whether the caller holds one of the permissions."""
        return any(permission in self.permissions for permission in permissions)

    @property
    def is_webui(self) -> bool:
        """Whether the request came through the webui listener."""
        return self.profile == Profile.WEBUI

    @property
    def is_anonymous_webui(self) -> bool:
        """Whether this is the WebUI client's habit of naming nobody, with a key that may act for anybody."""
        return self.is_webui and self.impersonate and self.username_status == UsernameStatus.ABSENT

    def enforce(self, permissions: list[str], absence: Absence = Absence.REFUSED_IN_WEBUI) -> None:
        """Refuses a user who is not known, not allowed to be named, or without all of the permissions.

        Raises:
            Unauthenticated, PermissionDenied, InvalidArgument.
        """
        if self.username_status == UsernameStatus.UNREADABLE:
            raise InvalidArgument("Non-base16 digit found")  # the words of contract 1.2
        if self.username_status == UsernameStatus.UNKNOWN:
            raise Unauthenticated("Unauthorized")
        if self.username_status == UsernameStatus.FOREIGN:
            raise PermissionDenied(f"the API key of {self.key_owner} may not act for {self.name}")
        if self.username_status == UsernameStatus.ABSENT and self.is_webui:
            if absence == Absence.ALLOWED and self.impersonate:
                return
            if absence == Absence.REFUSED_IN_WEBUI:
                raise Unauthenticated("Unauthorized")
        if permissions and not self.may(*permissions):
            raise PermissionDenied(f"User {self.name} has no permissions: {permissions!r}")


@dataclass(frozen=True)
class Origin:
    """Where a request came from: the client's address as the gateway saw it, and the request's id."""

    address: str = ""
    request_id: str = ""


_caller: ContextVar[Caller] = ContextVar("caller")
_origin: ContextVar[Origin] = ContextVar("origin", default=Origin())  # noqa: B039 - it is frozen
_judgement: ContextVar[Callable[[], None]] = ContextVar("judgement")


def current_caller() -> Caller:
    """The caller of the RPC that this task serves."""
    return _caller.get()


def find_caller() -> Caller | None:
    """The caller, or None where this task serves no RPC but does what the service does by itself."""
    return _caller.get(None)


def set_caller(caller: Caller) -> None:
    """Remembers the caller for this task; the server's interceptor does so before the servicer runs."""
    _caller.set(caller)


def current_origin() -> Origin:
    """Where the RPC that this task serves came from; empty where it serves none."""
    return _origin.get()


def set_origin(origin: Origin) -> None:
    """Remembers the origin for this task; the server's interceptor does so before the servicer runs."""
    _origin.set(origin)


def enforce() -> None:
    """Refuses a user who may not, by what the RPC under way declares; for RPCs with `enforced_by_servicer`.

    Raises:
        Unauthenticated, PermissionDenied, InvalidArgument.
    """
    _judgement.get()()


def set_judgement(judge: Callable[[], None]) -> None:
    """Remembers for this task what `enforce` does; the server's interceptor does so before the servicer runs."""
    _judgement.set(judge)


class Signer:
    """Signs tokens; only identity has one."""

    def __init__(self, private_key_pem: bytes) -> None:
        key: object = None
        with suppress(ValueError, TypeError, UnsupportedAlgorithm):  # no key, one with a password, of an unknown kind
            key = load_pem_private_key(private_key_pem, password=None)
        if not isinstance(key, Ed25519PrivateKey):
            refuse("setting ESD_SIGNING_KEY_FILE: the signing key is not an Ed25519 private key")
        self._key = key
        self._key_id = _key_id(key.public_key())

    def sign(self, caller: Caller, audience: str, lifetime_seconds: int) -> str:
        """A token for the caller that the audience accepts for so long."""
        now = int(time.time())
        claims: dict[str, Any] = {key: value for key, value in asdict(caller).items() if key != "name"}
        claims |= {"iss": _ISSUER, "aud": audience, "sub": caller.name, "iat": now, "exp": now + lifetime_seconds}
        return jwt.encode(claims, self._key, algorithm="EdDSA", headers={"kid": self._key_id})


class Verifier:
    """Verifies tokens with identity's public keys: a PEM file with one key, or several while they rotate."""

    def __init__(self, public_keys_pem: str, audience: str = AUDIENCE_SERVICES) -> None:
        self._audience = [AUDIENCE_SERVICES, audience]
        self._keys: dict[str, Ed25519PublicKey] = {}
        for pem in public_keys_pem.split(_PEM_END)[:-1]:
            key: object = None
            with suppress(ValueError, UnsupportedAlgorithm):
                key = load_pem_public_key((pem + _PEM_END).strip().encode())
            if not isinstance(key, Ed25519PublicKey):
                refuse("setting ESD_VERIFYING_KEY_FILE: a verifying key is not an Ed25519 public key")
            self._keys[_key_id(key)] = key
        if not self._keys:  # with which nobody would be let in
            refuse("setting ESD_VERIFYING_KEY_FILE: there is no public key in PEM")
        # A token comes with every call of its 30 seconds or 5 minutes; its signature is looked at once.
        self._checked = lru_cache(maxsize=4096)(self._check)

    @classmethod
    def from_file(cls, path: Path, audience: str = AUDIENCE_SERVICES) -> Verifier:
        """Reads the keys; `audience` is accepted beside that of users and services."""
        return cls(read_secret(path), audience)

    def verify(self, token: str) -> Caller:
        """Who the token is for.

        Raises:
            Unauthenticated: it is not one of identity's, not for this service, or over.
            Unavailable: it is a user's, and over.
        """
        caller, end = self._checked(token)
        if time.time() < end:
            return caller
        if caller.kind == Kind.USER:  # made for this very request, which has waited ever since: the key may be good
            raise Unavailable("the request has waited for too long, try again")
        raise Unauthenticated("the token is not valid")

    def holds(self, token: str) -> bool:
        """Whether `verify` takes the token."""
        try:
            self.verify(token)
        except EsdError:
            return False
        return True

    def read(self, token: str) -> Caller:
        """Who a token is for that may be over, and for any service.

        Raises:
            Unauthenticated: it is not one of identity's.
        """
        return self._check(token, verify_aud=False)[0]

    def _check(self, token: str, **checks: bool) -> tuple[Caller, int]:
        """The token's caller and its end, in seconds since 1970, which may be over."""
        try:
            key = self._keys[jwt.get_unverified_header(token)["kid"]]
            # Clocks of machines differ a little: a token from a clock ahead of ours is good, one without an end is not.
            options: Any = {"verify_iat": False, "verify_exp": False, "require": ["exp"], **checks}
            claims = jwt.decode(
                token, key, algorithms=["EdDSA"], audience=self._audience, issuer=_ISSUER, options=options
            )
            caller = Caller(
                kind=Kind(claims["kind"]),
                name=claims["sub"],
                roles=claims["roles"],
                permissions=claims["permissions"],
                profile=Profile(claims["profile"]),
                username_status=UsernameStatus(claims["username_status"]),
                impersonate=claims["impersonate"],
                key_owner=claims["key_owner"],
                credential=claims["credential"],
            )
        except (jwt.InvalidTokenError, KeyError, ValueError):
            raise Unauthenticated("the token is not valid") from None
        return caller, claims["exp"]


def _key_id(key: Ed25519PublicKey) -> str:
    return key.public_bytes_raw().hex()[:16]
