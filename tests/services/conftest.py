"""Owns what the tests of all services share. Each fixture is a thin door to tests/serving.py.

tokens         the session's key pair: private_key_pem, public_key_pem, signer, verifier()
user_token     user_token("ann", ["role:all"], roles=…, profile=…, impersonate=…) → metadata of a call
service_token  service_token("endpoints") → metadata
worker_token   worker_token(endpoint_id) → metadata, accepted by servers with audience "inference"
http           an HTTP client for presigned URLs
serve          await serve(lambda server: add_X_to_server(servicer, server)) → grpc.aio.Channel for the test
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import grpc
import httpx
import pytest

from services.common.auth import AUDIENCE_SERVICES
from tests.serving import AddServicers, Metadata, Tokens, serving


@pytest.fixture(scope="session")
def tokens() -> Tokens:
    """The key pair of this session."""
    return Tokens()


@pytest.fixture(scope="session")
def user_token(tokens: Tokens) -> Callable[..., Metadata]:
    """Makes the metadata of a user's call."""
    return tokens.user


@pytest.fixture(scope="session")
def service_token(tokens: Tokens) -> Callable[[str], Metadata]:
    """Makes the metadata of a service's call."""
    return tokens.service


@pytest.fixture(scope="session")
def worker_token(tokens: Tokens) -> Callable[[str], Metadata]:
    """Makes the metadata of a worker's call."""
    return tokens.worker


@pytest.fixture(scope="session")
async def http() -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client for presigned URLs."""
    async with httpx.AsyncClient() as client:
        yield client


@pytest.fixture
async def serve(tokens: Tokens) -> AsyncIterator[Callable[..., Awaitable[grpc.aio.Channel]]]:
    """Starts the real server with the given servicers and answers a channel to it."""
    async with AsyncExitStack() as stack:

        async def start(add_servicers: AddServicers, audience: str = AUDIENCE_SERVICES) -> grpc.aio.Channel:
            return await stack.enter_async_context(serving(add_servicers, tokens.verifier(audience)))

        yield start
