"""The end of a gateway: what is under way ends well, within bounds, and nothing new begins."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path

import grpc
import httpx
import psutil
import pytest

from esd.inference.v1 import inference_pb2, inference_pb2_grpc
from tests.gateway.conftest import Gateway, Seen, running_gateway
from tests.processes import ROOT

EVENTS = "/inferences/some-job/events"
HOUR = "3600"


def events(answer: httpx.Response) -> AsyncIterator[dict[str, object]]:
    """The events of a job, as they come."""
    return (json.loads(line.removeprefix("data: ")) async for line in answer.aiter_lines() if line)


async def until_refused(gateway: Gateway) -> None:
    """Returns when the gateway takes no connection any more."""
    host, port = gateway.address.split(":")
    while True:
        try:
            _, writer = await asyncio.open_connection(host, int(port))
        except ConnectionError:
            return
        writer.close()


async def num_unsent_bytes(folder: Path) -> int:
    """What the gateway has of its answers still to send."""
    transport = httpx.AsyncHTTPTransport(uds=str(folder / "run" / "admin.socket"))
    async with httpx.AsyncClient(transport=transport) as client:
        stats = await client.get("http://admin/stats?filter=http.document.downstream_cx_tx_bytes_buffered")
    return int(stats.text.split(":")[1])


async def test_events_under_way_come_to_their_end_while_new_connections_are_refused(
    services: tuple[str, Seen], seen: Seen, tmp_path: Path
) -> None:
    seen.may_end.clear()
    async with running_gateway(tmp_path, services[0], ESD_STOP_SECONDS=HOUR) as gateway:
        async with gateway.client.stream("GET", EVENTS) as answer, aclosing(events(answer)) as coming:
            assert await anext(coming) == {"queued": {"position": 1}}
            gateway.process.terminate()
            await until_refused(gateway)
            seen.may_end.set()
            assert [next(iter(event)) async for event in coming] == ["preview", "image", "done"]
        assert await gateway.process.wait() == 0


@pytest.mark.slow
async def test_a_large_answer_arrives_whole_however_slowly_its_client_reads(
    services: tuple[str, Seen], tmp_path: Path
) -> None:
    async with running_gateway(tmp_path, services[0], ESD_STOP_SECONDS=HOUR) as gateway:
        async with gateway.client.stream("GET", "/roles?role=15000") as answer:
            while not await num_unsent_bytes(tmp_path):  # noqa: ASYNC110 - of Envoy
                await asyncio.sleep(0.05)
            gateway.process.terminate()
            await until_refused(gateway)
            assert len(json.loads(await answer.aread())["data"]["roles"]) == 15000
        assert await gateway.process.wait() == 0


@pytest.mark.slow
async def test_events_without_an_end_are_cut_when_the_time_is_over(
    services: tuple[str, Seen], seen: Seen, tmp_path: Path
) -> None:
    seen.may_end.clear()
    async with (
        running_gateway(tmp_path, services[0], ESD_STOP_SECONDS="1") as gateway,
        gateway.client.stream("GET", EVENTS) as answer,
        aclosing(events(answer)) as coming,
    ):
        await anext(coming)
        gateway.process.terminate()
        with pytest.raises(httpx.RemoteProtocolError):
            await anext(coming)
        assert await gateway.process.wait() == 0


@pytest.mark.slow
async def test_nobody_waits_for_the_streams_of_workers(services: tuple[str, Seen], tmp_path: Path) -> None:
    async with (
        running_gateway(tmp_path, services[0], ESD_STOP_SECONDS=HOUR) as gateway,
        grpc.aio.insecure_channel(gateway.address) as channel,
    ):
        stream = inference_pb2_grpc.QueueServiceStub(channel).Work()
        await stream.write(inference_pb2.WorkRequest(hello={"held_leases": ["a"]}))
        assert (await stream.read()).welcome.kept_leases == ["a"]
        gateway.process.terminate()
        with pytest.raises(grpc.aio.AioRpcError) as cut:
            await stream.read()
        assert cut.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await gateway.process.wait() == 0


async def test_a_gateway_that_lingers_ends_each_connection_with_its_answer_and_itself_at_a_second_signal(
    services: tuple[str, Seen], tmp_path: Path
) -> None:
    async with running_gateway(tmp_path, services[0], ESD_LINGER_SECONDS=HOUR) as gateway:
        assert "connection" not in (await gateway.client.get("/ping")).headers
        gateway.process.terminate()
        while (answer := await gateway.client.get("/ping")).headers.get("connection") != "close":
            assert answer.status_code == 200
        assert (await gateway.client.get("/ping")).json()["message"] == "pong", "a new connection is served"
        gateway.process.terminate()
        assert await gateway.process.wait() == 0


@pytest.mark.slow
async def test_envoy_dies_with_the_process_that_runs_it(services: tuple[str, Seen], tmp_path: Path) -> None:
    async with running_gateway(tmp_path, services[0]) as gateway:
        (envoy,) = psutil.Process(gateway.process.pid).children()
        gateway.process.kill()
        await gateway.process.wait()
        assert await asyncio.to_thread(psutil.wait_procs, [envoy]) == ([envoy], [])


async def test_the_gateway_ends_when_envoy_does(services: tuple[str, Seen], tmp_path: Path) -> None:
    async with running_gateway(tmp_path, services[0]) as gateway:
        (envoy,) = psutil.Process(gateway.process.pid).children()
        envoy.kill()
        assert await gateway.process.wait() == 128 + 9


def test_a_signal_to_stop_counts_after_news_of_a_child_that_has_not_ended() -> None:
    command = [sys.executable, "-m", "gateway.drain", "--linger", "0", "--stop", "1", "--", "sleep", "1000"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as runner:
        until(lambda: [child.name() for child in psutil.Process(runner.pid).children()] == ["sleep"])
        (child,) = psutil.Process(runner.pid).children()
        for number, status in ((signal.SIGSTOP, psutil.STATUS_STOPPED), (signal.SIGCONT, psutil.STATUS_SLEEPING)):
            child.send_signal(number)
            until(lambda status=status: child.status() == status)
        runner.terminate()
        assert runner.wait() == 128 + signal.SIGTERM


def until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)
