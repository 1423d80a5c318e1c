"""Owns what tests need to call a servicer as the gateway or another service would: tokens of their own key, a server.

tokens = Tokens()                                        one Ed25519 key pair
stub.ListRoles(request, metadata=tokens.user("ann", ["role:all"]))
async with serving(add_servicers, tokens.verifier()) as channel: ...
assert "in words" in await fails(stub.CreateRole(request), grpc.StatusCode.INVALID_ARGUMENT)
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from services.common.auth import (
    AUDIENCE_SERVICES,
    TOKEN_METADATA,
    Caller,
    Kind,
    Profile,
    Signer,
    UsernameStatus,
    Verifier,
)
from services.common.server import Server

AUDIT_KEY = "the key of the audit, which is as long as it must be"
Metadata = tuple[tuple[str, str], ...]
AddServicers = Callable[[grpc.aio.Server], None]


class Tokens:
    """A key pair, and call metadata signed with it. Tokens live for ten minutes."""

    def __init__(self) -> None:
        key = Ed25519PrivateKey.generate()
        self.private_key_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        self.public_key_pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
        self.signer = Signer(self.private_key_pem)

    def verifier(self, audience: str = AUDIENCE_SERVICES) -> Verifier:
        """What a service verifies these tokens with."""
        return Verifier(self.public_key_pem, audience)

    def user(
        self,
        name: str = "ann",
        permissions: list[str] | None = None,
        roles: list[str] | None = None,
        *,
        profile: Profile = Profile.DOCUMENT,
        username_status: UsernameStatus = UsernameStatus.NAMED,
        impersonate: bool = False,
        key_owner: str = "",
    ) -> Metadata:
        """The metadata of a user's request; the key's owner is the user unless another is named."""
        caller = Caller(
            kind=Kind.USER,
            name=name,
            roles=roles or [],
            permissions=permissions or [],
            profile=profile,
            username_status=username_status,
            impersonate=impersonate,
            key_owner=key_owner or name,
        )
        return self.of(caller)

    def service(self, name: str) -> Metadata:
        """The metadata of another service's request."""
        return self.of(Caller(Kind.SERVICE, name))

    def worker(self, endpoint_id: str) -> Metadata:
        """The metadata of a worker of the endpoint; only inference accepts it."""
        return self.of(Caller(Kind.WORKER, endpoint_id), "inference")

    def trainer(self, training_id: str) -> Metadata:
        """The metadata of the trainer of the training; only training accepts it."""
        return self.of(Caller(Kind.TRAINER, training_id), "training")

    def of(self, caller: Caller, audience: str = AUDIENCE_SERVICES, lifetime_seconds: int = 600) -> Metadata:
        """The metadata of any caller."""
        return ((TOKEN_METADATA, self.signer.sign(caller, audience, lifetime_seconds)),)


@asynccontextmanager
async def serving(add_servicers: AddServicers, verifier: Verifier) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to the real server with these servicers, on a port of its own, during the block."""
    server = Server("127.0.0.1:0", verifier)
    add_servicers(server.grpc)
    port = await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(grace_seconds=0)


async def fails(call: Any, code: grpc.StatusCode) -> str:
    """The sentence with which a call is refused that must be, with this status."""
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call
    assert failure.value.code() == code, failure.value.details()
    return failure.value.details() or ""
