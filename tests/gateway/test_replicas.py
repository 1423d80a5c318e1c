"""What is asked behind the gateway is away or slow, as in a rolling restart."""

from __future__ import annotations

import asyncio
from pathlib import Path

from deploy.local.ports import free_port
from tests.gateway.conftest import SLOW_KEY, Gateway, Seen, running_gateway

REQUESTS, AT_ONCE = 400, 16


async def test_while_one_replica_is_away_the_other_answers_every_request(
    services: tuple[str, Seen], tmp_path: Path
) -> None:
    replicas = f"{services[0]},127.0.0.1:{free_port()}"
    addresses = {"ESD_IDENTITY_ADDRESS": replicas, "ESD_INFERENCE_ADDRESS": replicas}
    async with running_gateway(tmp_path, services[0], **addresses) as gateway:

        async def ask() -> list[int]:
            return [(await gateway.client.get("/inferences/1")).status_code for _ in range(REQUESTS // AT_ONCE)]

        answers = await asyncio.gather(*(ask() for _ in range(AT_ONCE)))
    assert [status for of_one in answers for status in of_one] == [200] * REQUESTS


async def test_an_identity_that_takes_a_second_is_waited_for(gateway: Gateway) -> None:
    assert (await gateway.client.get("/ping", headers={"x-api-key": SLOW_KEY})).status_code == 200
