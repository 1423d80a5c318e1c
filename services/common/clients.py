"""Channels to other services, which carry this process's token."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc

from esd.identity.v1 import identity_pb2, identity_pb2_grpc
from services.common.auth import TOKEN_METADATA
from services.common.rpc_errors import answer

# A service that restarts is back within a second or two, so look for it again soon.
_OPTIONS = [
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
    # A peer that vanished without a word is noticed within 20 seconds while a call waits for it; idle channels rest.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 0),  # no limit: a stream may be silent for hours
]
_RENEW_AT = 0.7  # of a token's life


class TokenSource:
    """Trades a secret for tokens at identity, and renews them before they end."""

    def __init__(self, identity_address: str, secret: str, credentials: grpc.ChannelCredentials | None = None) -> None:
        self._stub = identity_pb2_grpc.IdentityServiceStub(plain_channel(identity_address, credentials))
        self._secret = secret
        self._token = ""
        self._renew_at = 0.0
        self._lock = asyncio.Lock()

    async def token(self) -> str:
        """A token that is valid for a while.

        Raises:
            grpc.aio.AioRpcError: identity does not answer (UNAVAILABLE) or does not know the secret (UNAUTHENTICATED).
        """
        async with self._lock:
            if time.monotonic() >= self._renew_at:
                request = identity_pb2.IssueTokenRequest(secret=self._secret)
                response = await self._stub.IssueToken(request, timeout=10, wait_for_ready=True)
                self._token = response.token
                self._renew_at = time.monotonic() + _RENEW_AT * response.lifetime_seconds
            return self._token

    def forget(self) -> None:
        """Makes the next token a new one, after this one was refused."""
        self._renew_at = 0.0


def token_review(identity: grpc.aio.Channel) -> Callable[[Sequence[str]], Awaitable[Sequence[bool]]]:
    """What asks identity which tokens would be issued the same now; it raises Unavailable while identity is away."""
    stub = identity_pb2_grpc.IdentityServiceStub(identity)

    async def review(tokens: Sequence[str]) -> Sequence[bool]:
        request = identity_pb2.ReviewTokensRequest(tokens=tokens)
        response = await answer(stub.ReviewTokens(request, timeout=10), "identity")
        return list(response.holds)

    return review


def plain_channel(
    address: str, credentials: grpc.ChannelCredentials | None = None, interceptors: list[Any] | None = None
) -> grpc.aio.Channel:
    """A channel to `host:port` without a token; with TLS when credentials are given.

    Several IPv4 addresses with commas between them are replicas, called in turn; one that is down is left out.
    """
    options: list[tuple[str, int | str]] = [*_OPTIONS]
    if "," in address:
        address, options = f"ipv4:{address}", [*options, ("grpc.lb_policy_name", "round_robin")]
    if credentials is not None:
        return grpc.aio.secure_channel(address, credentials, options=options, interceptors=interceptors)
    return grpc.aio.insecure_channel(address, options=options, interceptors=interceptors)


def channel(address: str, tokens: TokenSource, credentials: grpc.ChannelCredentials | None = None) -> grpc.aio.Channel:
    """A channel whose calls carry a token from the source."""
    interceptors = [_UnaryUnary(tokens), _UnaryStream(tokens), _StreamStream(tokens)]
    return plain_channel(address, credentials, interceptors)


class _TokenInterceptor:
    def __init__(self, tokens: TokenSource) -> None:
        self._tokens = tokens

    async def _call(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        metadata = grpc.aio.Metadata(*(details.metadata or ()))
        metadata[TOKEN_METADATA] = await self._tokens.token()
        return await continuation(details._replace(metadata=metadata), request)


class _UnaryUnary(_TokenInterceptor, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self._call(continuation, client_call_details, request)


class _UnaryStream(_TokenInterceptor, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self._call(continuation, client_call_details, request)


class _StreamStream(_TokenInterceptor, grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await self._call(continuation, client_call_details, request_iterator)
