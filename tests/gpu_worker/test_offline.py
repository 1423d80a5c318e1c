"""A worker fetches nothing from a model hub and reports to nobody: it works where only this machine is reached."""

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from gpu_worker.__main__ import OFFLINE
from tests.gpu_worker.conftest import ObjectStore
from tests.gpu_worker.doors import SECRET, services

pytestmark = pytest.mark.slow

ATTEMPT = "connection attempt to"
# Wraps what opens connections; an attempt is also printed, as a library may swallow the error.
WORKER = f"""
import atexit, socket, sys

def guarded(call, host_of):
    def guard(*arguments, **named):
        host = host_of(*arguments)
        if host not in ("127.0.0.1", "::1", "localhost", None):
            print("{ATTEMPT}", host, file=sys.stderr, flush=True)
            raise OSError("the network is not there")
        return call(*arguments, **named)
    return guard

def peer(connection, address):
    return address[0] if isinstance(address, tuple) else None

if "--check" in sys.argv:
    socket.socket.connect = guarded(socket.socket.connect, peer)
    socket.create_connection(("192.0.2.1", 80))
for name in ("connect", "connect_ex"):
    setattr(socket.socket, name, guarded(getattr(socket.socket, name), peer))
socket.getaddrinfo = guarded(socket.getaddrinfo, lambda host, *_: host)

@atexit.register
def tell():
    print("imported", *(name for name in ("diffusers", "bitsandbytes") if sys.modules.get(name)), file=sys.stderr)

from gpu_worker.__main__ import main
main()
"""


async def start(folder: Path, *arguments: str, **settings: str) -> asyncio.subprocess.Process:
    (folder / "secret").write_text(SECRET)
    inherited = {name: value for name, value in os.environ.items() if name not in OFFLINE}  # the worker's own doing
    own = {"ESD_SECRET_FILE": str(folder / "secret"), "ESD_CACHE_DIR": str(folder), "ESD_DEVICE": "cpu"}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        WORKER,
        *arguments,
        env=inherited | own | {"ESD_NUM_THREADS": "1", "HF_HOME": str(folder / "hub")} | settings,
        stderr=asyncio.subprocess.PIPE,
    )


async def test_a_job_runs_where_only_this_machine_is_reached(
    tmp_path: Path, store: ObjectStore, make_spec: Any
) -> None:
    async with services() as peers:
        spec = make_spec()
        process = await start(tmp_path, ESD_SERVER_URL=f"http://{peers.address}")
        connection = await peers.queue.connection()
        await connection.welcome()
        await connection.until_room()
        await connection.assign("lease-1", spec)
        await connection.until("done")
        await connection.acknowledge("lease-1")
        process.terminate()
        _, log = await process.communicate()
    assert process.returncode == 0, log.decode()
    assert ATTEMPT not in log.decode()
    assert f"{spec.job_id}/image_0.png" in store.objects
    assert "imported diffusers\n" in log.decode()  # and not what looks for kernels on a hub


async def test_the_guard_of_this_test_sees_an_attempt(tmp_path: Path) -> None:
    process = await start(tmp_path, "--check", ESD_SERVER_URL="http://127.0.0.1:1")
    _, log = await process.communicate()
    assert process.returncode == 1
    assert f"{ATTEMPT} 192.0.2.1" in log.decode()
