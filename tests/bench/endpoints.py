"""How fast endpoints come and grow: creation to InService, from zero to the first picture, a round of the control loop.

python -m tests.bench endpoints
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

from deploy.local.demo import Client
from deploy.local.home import Home
from deploy.local.ports import free_port
from deploy.local.postgres import Postgres
from services.common import logs
from services.common.audit import Audit
from services.common.database import Database
from services.common.settings import Settings
from services.endpoints.cluster.local import LocalCluster
from services.endpoints.cluster.machine import LocalSettings
from services.endpoints.domain import Endpoints, NewEndpoint
from services.endpoints.event_store import EventStore
from services.endpoints.reconcile import ControlLoop
from services.endpoints.scaling import Load, ScalingPolicy
from services.endpoints.store import EndpointStore
from services.endpoints.task_control import TaskControl
from services.endpoints.task_store import TaskStore
from tests.processes import process_environment, running

NUM_ENDPOINTS = 100
NUM_ROUNDS = 20
_SLEEPER = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"]


def start_and_growth(client: Client, draw: Callable[[], object]) -> tuple[list[float], list[float]]:
    """Seconds from a creation to InService, and from the start of a job of a pool without workers to its picture.

    The stack runs with ESD_SCALE_IN_SECONDS=0, so a pool that is idle goes to zero at once. `draw` runs one job.
    """
    started, grown = [], []
    for number in range(3):
        body = {
            "endpoint_name": f"bench{number}",
            "endpoint_type": "Async",
            "instance_type": "local",
            "initial_instance_count": 1,
            "autoscaling_enabled": True,
            "assign_to_roles": ["demo"],
        }
        began = time.monotonic()
        endpoint = client.call("POST", "/endpoints", body)
        query = {"endpointDeploymentJobId": endpoint["EndpointDeploymentJobId"]}
        has_started = False
        while not (has_started and endpoint["endpoint_status"] == "InService" and _is_empty(endpoint)):
            if not has_started and endpoint["endTime"]:
                started.append(time.monotonic() - began)
                has_started = True
            if endpoint["endpoint_status"] == "Failed":
                raise SystemExit(endpoint["error"])
            time.sleep(0.05)
            (endpoint,) = client.call("GET", "/endpoints", **query)["endpoints"]
        began = time.monotonic()
        draw()
        grown.append(time.monotonic() - began)
        client.call("DELETE", "/endpoints", {"endpoint_name_list": [endpoint["endpoint_name"]]})
    return started, grown


def _is_empty(endpoint: dict[str, Any]) -> bool:
    return bool(endpoint["current_instance_count"] == "0")


class _NoIdentity:
    """Gives secrets that nobody asks for."""

    async def create_secret(self, holder: str, owner_id: str) -> str:
        return owner_id


def rounds() -> list[float]:
    """Milliseconds of each round of the control loop when 100 endpoints have what they want: a process each."""
    with tempfile.TemporaryDirectory(prefix="esd-bench-") as folder:
        Path(folder).chmod(0o711)  # PostgreSQL's user must get through, when root runs this
        server = Postgres(Home(Path(folder)), free_port())
        server.prepare()
        with running(server.command(), process_environment()):
            server.wait_until_up()
            server.bootstrap(["endpoints"])
            logs.configure("bench", Settings(log_level="warning"))
            return asyncio.run(_rounds(server.url("endpoints"), Path(folder)))


async def _rounds(database_url: str, folder: Path) -> list[float]:
    database = Database(database_url)
    await database.migrate("endpoints")
    store = EndpointStore(database, Audit("endpoints", "of no use to anybody here, and long enough"))
    identity: Any = _NoIdentity()
    domain = Endpoints(store, EventStore(database), identity, identity, max_workers=1)
    settings = LocalSettings(_SLEEPER, folder / "workers", "", folder / "key", "cpu", [])
    wake = asyncio.Event()
    tasks = TaskStore(database)
    cluster = LocalCluster(store, tasks, settings, wake.set)
    queue: Any = None
    task_control = TaskControl(tasks, identity, cluster, wake)
    control = ControlLoop(store, database, identity, queue, cluster, task_control, wake, ScalingPolicy())
    for _ in range(NUM_ENDPOINTS):
        await domain.create_endpoint(NewEndpoint("", "Async", "any", 1, True, 0, 1, [str(uuid4())]), "bench")
    await control.reconcile()
    workers = await store.get_workers()
    control.hear({row.endpoint_id: Load(frozenset([row.worker_id]), 1, 0) for row in workers})
    for _ in range(3):
        await control.reconcile()
    if any(row.status != "InService" for row in await store.get_all()):
        raise SystemExit("the endpoints did not come into service")
    milliseconds = []
    for _ in range(NUM_ROUNDS):
        began = time.perf_counter()
        await control.reconcile()
        milliseconds.append(1000 * (time.perf_counter() - began))
    for row in workers:
        os.kill(row.pid or 0, signal.SIGKILL)
    cluster.close()
    await database.dispose()
    return milliseconds
