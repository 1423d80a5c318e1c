"""Owns a running identity service for each test: the real server on a real database, with its first key."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from cryptography.fernet import Fernet

from esd.identity.v1 import ext_authz_pb2 as authz
from esd.identity.v1 import ext_authz_pb2_grpc, identity_pb2_grpc
from esd.identity.v1 import identity_pb2 as pb
from services.common.audit import Audit
from services.common.auth import Caller, Profile
from services.common.database import Database
from services.common.server import Server
from services.common.tasks import cancel
from services.identity.authz import SECRET_METADATA, AuthorizationServicer
from services.identity.domain import Identity
from services.identity.key_uses import KeyUses
from services.identity.keys import new_api_key
from services.identity.passwords import Passwords
from services.identity.servicer import IdentityServicer
from services.identity.store import CHANGED, IdentityStore
from services.identity.tokens import Tokens as IdentityTokens
from services.identity.tokens import sha256
from tests.serving import AUDIT_KEY, Metadata, Tokens

ALL = ["train:all", "checkpoint:all", "inference:all", "sagemaker_endpoint:all", "user:all", "role:all"]
GATEWAY_SECRET = "the gateway's secret"
MODELS_SECRET = "the models service's secret"


@dataclass
class Running:
    """One identity service and what is needed to call it."""

    address: str
    channel: grpc.aio.Channel
    database: Database
    store: IdentityStore
    domain: Identity
    issued: IdentityTokens
    tokens: Tokens
    first_key: str
    notified: asyncio.Event
    stub: Any = field(init=False)
    authorization: Any = field(init=False)

    def __post_init__(self) -> None:
        self.stub = identity_pb2_grpc.IdentityServiceStub(self.channel)
        self.authorization = ext_authz_pb2_grpc.AuthorizationStub(self.channel)

    @property
    def admin(self) -> Metadata:
        """The metadata of user `api` with the first key."""
        return self.tokens.user("api", ALL, ["IT Operator"], impersonate=True)

    async def check(
        self, profile: str = "document", secret: str = GATEWAY_SECRET, **headers: str
    ) -> authz.CheckResponse:
        """What the gateway is told about a request; `_` stands for `-` in the names of headers."""
        request = authz.CheckRequest()
        request.attributes.context_extensions["profile"] = profile
        for name, value in headers.items():
            request.attributes.request.http.headers[name.replace("_", "-")] = value
        return await self.authorization.Check(request, metadata=((SECRET_METADATA, secret),))

    async def caller(self, key: str, profile: Profile = Profile.DOCUMENT, **headers: str) -> Caller:
        """Who the services see behind a request that passes."""
        response = await self.check(profile, x_api_key=key, **headers)
        assert response.status.code == 0
        return self.tokens.verifier().verify(response.ok_response.headers[0].header.value)

    async def make_user(self, name: str, permissions: list[str]) -> str:
        """Makes a user with one role of these permissions and answers a plain key of theirs."""
        role = f"role of {name}"
        await self.stub.CreateRole(pb.CreateRoleRequest(role_name=role, permissions=permissions), metadata=self.admin)
        user = pb.CreateUserRequest(username=name, password="secret", roles=[role])
        await self.stub.CreateUser(user, metadata=self.admin)
        return (await self.stub.CreateApiKey(pb.CreateApiKeyRequest(username=name), metadata=self.admin)).key


@pytest.fixture
def database_url(lend_database: Callable[[str], str]) -> str:
    """The URL of a database with the service's tables."""
    return lend_database("identity")


@pytest.fixture(scope="session")
def password_key() -> str:
    return Fernet.generate_key().decode()


@pytest.fixture
async def start_replica(tokens: Tokens, password_key: str, database_url: str) -> AsyncIterator[Callable[[], Any]]:
    """Starts replicas of identity on one database, as services/identity/__main__.py does."""
    first_key = new_api_key()
    async with AsyncExitStack() as stack:

        async def start() -> Running:
            database = Database(database_url)
            stack.push_async_callback(database.dispose)
            store = IdentityStore(database, Audit("identity", AUDIT_KEY))
            uses = KeyUses(store)
            issued = IdentityTokens(
                store, tokens.signer, tokens.verifier(), {sha256(MODELS_SECRET): "models"}, uses.note
            )
            identity = Identity(store, Passwords(password_key), issued.forget)
            await identity.bootstrap(first_key)
            notified = asyncio.Event()

            async def on_notify(channel: str, payload: str) -> None:
                issued.forget()
                notified.set()

            def add(server: grpc.aio.Server) -> None:
                identity_pb2_grpc.add_IdentityServiceServicer_to_server(IdentityServicer(identity, issued), server)
                servicer = AuthorizationServicer(issued, sha256(GATEWAY_SECRET))
                ext_authz_pb2_grpc.add_AuthorizationServicer_to_server(servicer, server)

            stack.push_async_callback(cancel, [asyncio.create_task(database.listen([CHANGED], on_notify))])
            stack.push_async_callback(cancel, [asyncio.create_task(uses.write())])
            server = Server("127.0.0.1:0", tokens.verifier())
            add(server.grpc)
            address = f"127.0.0.1:{await server.start()}"
            stack.push_async_callback(server.stop, 0)
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
            await notified.wait()
            return Running(address, channel, database, store, identity, issued, tokens, first_key, notified)

        yield start


@pytest.fixture
async def identity(start_replica: Callable[[], Any]) -> Running:
    """A running identity service."""
    return await start_replica()
