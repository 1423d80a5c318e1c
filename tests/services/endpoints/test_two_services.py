"""Two services on one database: one leads, either may be killed at any moment, and the result is the same."""

import os
from pathlib import Path
from typing import Any

import psutil
import pytest

from services.endpoints.domain import Endpoints, NewEndpoint
from services.endpoints.event_store import EventStore
from services.endpoints.rows import Worker
from services.endpoints.store import EndpointStore
from tests.services.endpoints.conftest import Peers, StartService, is_alive, until


@pytest.mark.slow
async def test_the_leader_is_killed_while_it_starts_and_while_it_ends_workers(
    start_service: StartService,
    domain: Endpoints,
    store: EndpointStore,
    database: Any,
    peers: Peers,
    tmp_path: Path,
) -> None:
    services = [await start_service(), await start_service()]
    endpoint = await domain.create_endpoint(NewEndpoint("a", "Async", "any", 3, False, 0, 1, ["painter"]), "ann")

    async def launched() -> list[Worker]:
        return [row for row in await store.get_workers() if row.pid]

    first = (await until(launched))[0]
    leader = psutil.Process(first.pid).ppid()
    assert leader in [service.pid for service in services]  # and of the two it alone starts workers
    os.kill(leader, 9)
    (other,) = [service for service in services if service.pid != leader]

    async def all_live() -> list[Worker]:
        rows = await store.get_workers()
        (row,) = await store.get_all()
        return rows if (row.status, row.num_live) == ("InService", 3) and all(row.was_live for row in rows) else []

    workers = await until(all_live)
    assert all(is_alive(row.pid) for row in workers)
    assert peers.queue.workers[endpoint.id] == {row.worker_id for row in workers}
    started = [e for e in await EventStore(database).page_events(endpoint.id, 100, None) if e.type == "WorkerStarted"]
    assert len(started) in (3, 4)  # only the one that was being started may have been started again

    await start_service()
    await domain.delete_endpoints([endpoint.name])
    await until(lambda: any(not is_alive(row.pid) for row in workers))
    other.kill()

    async def gone() -> bool:
        return await store.get_all() == []

    await until(gone)
    await until(lambda: not any(is_alive(row.pid) for row in workers))
    assert peers.identity.secrets == {}
    assert not (tmp_path / "workers" / endpoint.id).exists()
