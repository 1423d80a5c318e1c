"""One process of identity among several, asked without the gateway between."""

from __future__ import annotations

import grpc

from deploy.local.stack import Stack
from esd.identity.v1 import ext_authz_pb2, ext_authz_pb2_grpc, identity_pb2_grpc
from services.common.auth import TOKEN_METADATA, Verifier
from tests.serving import Metadata

NAMES = ("identity", "identity-2")


class Replica:
    """A process of a running stack, by its name there."""

    def __init__(self, stack: Stack, name: str) -> None:
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{stack.ports()[name]}")
        self.identity: identity_pb2_grpc.IdentityServiceAsyncStub = identity_pb2_grpc.IdentityServiceStub(self.channel)
        self._secret = (stack.home / "secrets" / "gateway.secret").read_text()
        self._verifier = Verifier.from_file(stack.home / "secrets" / "verifying-key.pem")

    async def token(self, key: str) -> str:
        """The token that the gateway would get for a key; empty for a bad one."""
        request = ext_authz_pb2.CheckRequest()
        request.attributes.request.http.headers["x-api-key"] = key
        stub = ext_authz_pb2_grpc.AuthorizationStub(self.channel)
        answer = await stub.Check(request, metadata=(("x-esd-secret", self._secret),))
        return answer.ok_response.headers[0].header.value if answer.HasField("ok_response") else ""

    async def acting(self, key: str) -> Metadata:
        """The metadata of a request with the key, as it would come from the gateway."""
        return ((TOKEN_METADATA, await self.token(key)),)

    async def permissions(self, key: str) -> list[str]:
        """What the owner of the key may do, as this replica sees it."""
        return self._verifier.verify(await self.token(key)).permissions
