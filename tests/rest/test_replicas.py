"""What one replica changes, the other knows at once. (How soon: tests/bench/revocation.py.)"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest

from deploy.local.stack import Stack
from esd.identity.v1 import identity_pb2 as pb
from tests.e2e.conftest import Api, new_user
from tests.rest.replicas import NAMES, Replica

pytestmark = pytest.mark.slow

KEPT_SECONDS = 10  # a token is kept for longer than this: what changes sooner was told


@pytest.fixture
async def replicas(stack: Stack) -> AsyncIterator[list[Replica]]:
    """Both."""
    both = [Replica(stack, name) for name in NAMES]
    yield both
    for replica in both:
        await replica.channel.close()


@pytest.mark.parametrize("turn", [1, -1], ids=["first to second", "second to first"])
async def test_a_changed_role_and_a_revoked_key_count_in_the_other_replica_before_its_tokens_end(
    admin: Api, replicas: list[Replica], turn: int
) -> None:
    here, there = replicas[::turn]
    name = f"replica{turn}"
    user = new_user(admin, name, ["train:all"])
    assert await there.permissions(user.key) == ["train:all"], "and the token is kept there now"
    acting = await here.acting(admin.key)

    changed = pb.CreateRoleRequest(role_name=name, permissions=["role:all", "train:all"])
    await here.identity.CreateRole(changed, metadata=acting)
    async with asyncio.timeout(KEPT_SECONDS):
        while await there.permissions(user.key) != ["role:all", "train:all"]:  # noqa: ASYNC110 - as the gateway asks
            await asyncio.sleep(0.01)
    keys = await here.identity.ListApiKeys(pb.ListApiKeysRequest(username=name), metadata=acting)
    await here.identity.DeleteApiKeys(pb.DeleteApiKeysRequest(key_id_list=[keys.keys[0].id]), metadata=acting)
    async with asyncio.timeout(KEPT_SECONDS):
        while await there.token(user.key):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    user.close()


def num_requests(stack: Stack, service: str) -> list[int]:
    """How many requests the gateway has sent to each process of a service."""
    transport = httpx.HTTPTransport(uds=str(stack.home / "run" / "gateway" / "admin.socket"))
    with httpx.Client(transport=transport) as client:
        clusters = client.get("http://admin/clusters?format=json").json()["cluster_statuses"]
    (hosts,) = [cluster["host_statuses"] for cluster in clusters if cluster["name"] == service]
    totals = {
        host["address"]["socket_address"]["port_value"]: int(counter.get("value", 0))
        for host in hosts
        for counter in host["stats"]
        if counter["name"] == "rq_total"
    }
    return [totals[stack.ports()[replica]] for replica in (service, f"{service}-2")]


PATHS = {
    "identity": "/roles",
    "models": "/checkpoints",
    "endpoints": "/endpoints",
    "inference": "/inferences",
    "training": "/trainings",
}


@pytest.mark.parametrize("service", PATHS)
def test_every_service_has_two_processes_and_the_gateway_asks_both(stack: Stack, admin: Api, service: str) -> None:
    before = num_requests(stack, service)
    # In turn, but for each of Envoy's threads anew.
    for _ in range(50):
        assert admin.call("GET", PATHS[service]).status == 200
    assert all(now > then for now, then in zip(num_requests(stack, service), before, strict=True))
