"""The worker as a process: exit codes, and the end by SIGTERM."""

import asyncio
import os
import subprocess
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from gpu_worker.__main__ import EXIT_REFUSED
from tests.gpu_worker.doors import SECRET, Services, services
from tests.processes import ROOT


@pytest.fixture
async def peers() -> AsyncIterator[Services]:
    async with services() as found:
        yield found


Start = Callable[..., Awaitable[Process]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Starts workers, none of which outlives the test."""
    started: list[Process] = []

    async def start(**settings: str) -> Process:
        (tmp_path / "secret").write_text(SECRET + "\n")
        environment = {"ESD_SECRET_FILE": str(tmp_path / "secret"), "ESD_CACHE_DIR": str(tmp_path), "ESD_DEVICE": "cpu"}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "gpu_worker",
            env=os.environ | environment | {"ESD_NUM_THREADS": "1"} | settings,
            stderr=asyncio.subprocess.PIPE,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.returncode is None:
            process.kill()
            await process.communicate()


@pytest.mark.slow
async def test_a_worker_told_to_stop_finishes_its_job_first(start: Start, peers: Services, make_spec: Any) -> None:
    process = await start(ESD_SERVER_URL=f"http://{peers.address}")
    connection = await peers.queue.connection()
    await connection.welcome()
    await connection.until_room()
    await connection.assign("lease-1", make_spec(steps=40))
    await connection.until("progress")
    process.terminate()
    await connection.until("done")
    await connection.acknowledge("lease-1")
    _, log = await process.communicate()
    assert process.returncode == 0, log.decode()


@pytest.mark.slow
async def test_a_worker_whose_drain_is_cut_off_gives_its_job_back_before_it_leaves(
    start: Start, peers: Services, make_spec: Any
) -> None:
    process = await start(ESD_SERVER_URL=f"http://{peers.address}", ESD_DRAIN_SECONDS="0")
    connection = await peers.queue.connection()
    await connection.welcome()
    await connection.until_room()
    await connection.assign("lease-1", make_spec(steps=150))
    await connection.until("progress")
    process.terminate()
    failed = (await connection.until("failed")).event.failed
    assert (failed.cancelled, failed.postponed) == (True, False)
    await connection.acknowledge("lease-1")
    _, log = await process.communicate()
    assert process.returncode == 0, log.decode()


@pytest.mark.slow
async def test_an_idle_worker_told_to_stop_leaves_without_draining(start: Start, peers: Services) -> None:
    process = await start(ESD_SERVER_URL=f"http://{peers.address}", ESD_DRAIN_SECONDS="3600")
    connection = await peers.queue.connection()
    await connection.welcome()
    await connection.until_room()
    process.terminate()
    while await connection.read() is not grpc.aio.EOF:
        pass
    _, log = await process.communicate()
    assert process.returncode == 0, log.decode()


@pytest.mark.slow
async def test_a_worker_whose_secret_is_not_known_leaves_with_its_own_code(start: Start, peers: Services) -> None:
    peers.identity.knows = False
    process = await start(ESD_SERVER_URL=f"http://{peers.address}")
    _, log = await process.communicate()
    assert process.returncode == EXIT_REFUSED, log.decode()
    assert "not known any more" in log.decode()


async def test_a_wrong_setting_is_named(start: Start) -> None:
    process = await start(ESD_SERVER_URL="gateway", ESD_DRAIN_SECONDS="soon", ESD_FP8="true")
    _, log = await process.communicate()
    assert process.returncode == 2
    assert "setting ESD_SERVER_URL: a value such as https://esd.example.org is wanted" in log.decode()
    assert "ESD_DRAIN_SECONDS" in log.decode()
    assert "ESD_FP8: needs ESD_PRECISION=bfloat16" in log.decode()


def test_whoever_gives_a_worker_arguments_is_told_how_to_train_by_hand() -> None:
    command = [sys.executable, "-m", "gpu_worker", "--help"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "python -m gpu_worker train config.toml" in refused.stderr


@pytest.mark.slow
def test_what_a_worker_compiled_the_next_one_finds_beside_the_models(tmp_path: Path) -> None:
    program = """
from pathlib import Path
from gpu_worker.__main__ import keep_compiled
keep_compiled(Path("cache"))
import torch
torch.compile(lambda x: x.sin() + 1)(torch.ones(2))
print({name for name in torch._dynamo.utils.counters["inductor"] if name.startswith("fxgraph_cache")})
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("TORCHINDUCTOR", "TRITON"))
    }
    # Compiled headers take longer to make than they save one function.
    environment |= {"PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0"}
    said = [
        subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert said == ["{'fxgraph_cache_miss'}\n", "{'fxgraph_cache_hit'}\n"]
    assert (tmp_path / "cache" / "compiled").is_dir()
