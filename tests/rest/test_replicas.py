"""What one replica changes, the other knows within a second."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import grpc
import pytest

from deploy.local.stack import Stack
from esd.identity.v1 import ext_authz_pb2, ext_authz_pb2_grpc, identity_pb2, identity_pb2_grpc
from services.common.auth import TOKEN_METADATA, Verifier
from tests.e2e.conftest import Api, new_user

pytestmark = pytest.mark.slow

REPLICAS = ("identity", "identity-2")


class Replica:
    """One process of identity, asked without the gateway between."""

    def __init__(self, stack: Stack, name: str) -> None:
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{stack.ports()[name]}")
        self._secret = (stack.home / "secrets" / "gateway.secret").read_text()
        self._verifier = Verifier.from_file(stack.home / "secrets" / "verifying-key.pem")

    async def token(self, key: str) -> str:
        """The token that the gateway would get for a key; empty for a bad one."""
        request = ext_authz_pb2.CheckRequest()
        request.attributes.request.http.headers["x-api-key"] = key
        stub = ext_authz_pb2_grpc.AuthorizationStub(self.channel)
        answer = await stub.Check(request, metadata=(("x-esd-secret", self._secret),))
        return answer.ok_response.headers[0].header.value if answer.HasField("ok_response") else ""

    async def permissions(self, key: str) -> list[str]:
        """What the owner of the key may do, as this replica sees it."""
        return self._verifier.verify(await self.token(key)).permissions


@pytest.fixture
async def replicas(stack: Stack) -> AsyncIterator[list[Replica]]:
    """Both."""
    both = [Replica(stack, name) for name in REPLICAS]
    yield both
    for replica in both:
        await replica.channel.close()


@pytest.mark.parametrize("turn", [1, -1], ids=["first to second", "second to first"])
async def test_a_changed_role_and_a_revoked_key_count_in_the_other_replica_within_a_second(
    admin: Api, replicas: list[Replica], turn: int
) -> None:
    here, there = replicas[::turn]
    name = f"replica{turn}"
    user = new_user(admin, name, ["train:all"])
    assert await there.permissions(user.key) == ["train:all"], "and the token is kept there now"
    stub = identity_pb2_grpc.IdentityServiceStub(here.channel)
    acting = ((TOKEN_METADATA, await here.token(admin.key)),)

    async def becomes(expected: object, question: object) -> None:
        end = time.monotonic() + 1
        while await question() != expected:  # type: ignore[operator]
            assert time.monotonic() < end, "more than a second"

    changed = identity_pb2.CreateRoleRequest(role_name=name, permissions=["role:all", "train:all"])
    await stub.CreateRole(changed, metadata=acting)
    await becomes(["role:all", "train:all"], lambda: there.permissions(user.key))
    key_id = (await stub.ListApiKeys(identity_pb2.ListApiKeysRequest(username=name), metadata=acting)).keys[0].id
    await stub.DeleteApiKeys(identity_pb2.DeleteApiKeysRequest(key_id_list=[key_id]), metadata=acting)
    await becomes("", lambda: there.token(user.key))
    user.close()


def test_every_service_has_two_processes_and_the_gateway_asks_both(stack: Stack, admin: Api) -> None:
    names = stack.processes()
    for service in ("identity", "models", "endpoints", "inference", "training"):
        assert {service, f"{service}-2"} <= set(names)
    for path in ("/roles", "/checkpoints", "/endpoints", "/inferences"):
        assert {admin.call("GET", path).status for _ in range(4)} == {200}
