"""Starts the identity service: `python -m services.identity` with the settings in the environment."""

from __future__ import annotations

import asyncio

from esd.identity.v1 import ext_authz_pb2_grpc, identity_pb2_grpc
from services.common import logs
from services.common.audit import Audit
from services.common.auth import Signer, Verifier
from services.common.database import Database
from services.common.process import refuse
from services.common.server import Server
from services.common.settings import load, read_secret
from services.identity.authz import AuthorizationServicer
from services.identity.domain import Identity
from services.identity.key_uses import KeyUses
from services.identity.passwords import Passwords
from services.identity.servicer import IdentityServicer
from services.identity.settings import IdentitySettings, read_secret_hashes
from services.identity.store import CHANGED, IdentityStore
from services.identity.tokens import Tokens


async def run(settings: IdentitySettings) -> None:
    """Migrates, bootstraps, and serves until told to stop."""
    hashes = read_secret_hashes(settings.secret_hashes_file)
    signer = Signer(read_secret(settings.signing_key_file).encode())
    passwords = _passwords(settings)
    first_key = _first_key(settings)
    database = Database(settings.database_url)
    audit = Audit.from_file("identity", settings.audit_key_file)
    store = IdentityStore(database, audit)
    uses = KeyUses(store)
    verifier = Verifier.from_file(settings.verifying_key_file)
    tokens = Tokens(store, signer, verifier, hashes.services, uses.note)
    identity = Identity(store, passwords, tokens.forget)

    async def on_notify(channel: str, payload: str) -> None:
        tokens.forget()

    server = Server(settings.listen, verifier)
    servicer = IdentityServicer(identity, tokens, settings.allow_initial_users)
    identity_pb2_grpc.add_IdentityServiceServicer_to_server(servicer, server.grpc)
    authorization = AuthorizationServicer(tokens, hashes.gateway)
    ext_authz_pb2_grpc.add_AuthorizationServicer_to_server(authorization, server.grpc)
    await database.migrate("identity")
    await identity.bootstrap(first_key)
    await server.run(database.listen([CHANGED], on_notify), uses.write(), audit.log_heads(database))
    await database.dispose()


def _passwords(settings: IdentitySettings) -> Passwords:
    try:
        return Passwords(read_secret(settings.password_key_file))
    except ValueError:
        refuse(f"setting ESD_PASSWORD_KEY_FILE: {settings.password_key_file} holds no Fernet key")


def _first_key(settings: IdentitySettings) -> str:
    key = read_secret(settings.api_key_file)
    if not key:
        refuse(f"setting ESD_API_KEY_FILE: {settings.api_key_file} is empty")
    return key


def main() -> None:
    """The process."""
    settings = load(IdentitySettings)
    logs.configure("identity", settings)
    asyncio.run(run(settings))


if __name__ == "__main__":
    main()
