"""Speaks Envoy's external authorization: an API key in, a signed token of the acting user out.

Nothing but a bad key is refused here. A missing, unknown or foreign `username` travels in the token and is refused by
the services, after they have looked at the request's body (contract 0.15).
"""

from __future__ import annotations

import base64
import hmac
from collections.abc import Mapping
from typing import Any

import grpc
from google.rpc import code_pb2

from esd.identity.v1 import ext_authz_pb2 as pb
from esd.identity.v1 import ext_authz_pb2_grpc as rpc
from services.common.auth import TOKEN_METADATA, Profile
from services.common.errors import Unauthenticated
from services.identity.tokens import UNREADABLE_NAME, Tokens, sha256

SECRET_METADATA = "x-esd-secret"  # noqa: S105 - a header's name
_BEARER = "bearer "


class AuthorizationServicer(rpc.AuthorizationServicer):
    """Answers the gateway, which proves itself with the secret of this SHA-256."""

    def __init__(self, tokens: Tokens, gateway_hash: str) -> None:
        self._tokens = tokens
        self._gateway_hash = gateway_hash

    async def Check(self, request: pb.CheckRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.CheckResponse:
        secret = dict(context.invocation_metadata() or ()).get(SECRET_METADATA, "")
        if not hmac.compare_digest(sha256(str(secret)), self._gateway_hash):
            raise Unauthenticated("the gateway's secret is needed")
        headers = request.attributes.request.http.headers
        profile = Profile(request.attributes.context_extensions.get("profile", Profile.DOCUMENT))
        key = headers.get("x-api-key", "")
        token = await self._tokens.of_key(key, acting_username(headers), profile) if key else None
        return _denied() if token is None else _passed(token)


def acting_username(headers: Mapping[str, str]) -> str | None:
    """The name in `username`, else in the legacy `Authorization: Bearer <BASE16(name)>`; None when both are absent,
    UNREADABLE_NAME when the latter cannot be decoded."""
    if username := headers.get("username"):
        return username
    authorization = headers.get("authorization", "")
    if not authorization.lower().startswith(_BEARER):
        return None
    try:
        return base64.b16decode(authorization[len(_BEARER) :].strip(), casefold=True).decode()
    except ValueError:
        return UNREADABLE_NAME


def _passed(token: str) -> pb.CheckResponse:
    add = pb.HeaderValueOption(
        header=pb.HeaderValue(key=TOKEN_METADATA, value=token),
        append_action=pb.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD,
    )
    response = pb.CheckResponse(
        ok_response=pb.OkHttpResponse(headers=[add], headers_to_remove=["x-api-key", "authorization", "username"])
    )
    response.status.code = code_pb2.OK
    return response


def _denied() -> pb.CheckResponse:
    response = pb.CheckResponse(denied_response=pb.DeniedHttpResponse(status=pb.HttpStatus(code=403), body="Forbidden"))
    response.status.code = code_pb2.PERMISSION_DENIED
    return response
