"""The control loop with real processes: what happens to workers, endpoints, secrets and jobs."""

import asyncio
import os
import signal
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from services.common.viewer import Viewer
from services.endpoints.domain import Change, Endpoints, NewEndpoint
from services.endpoints.rows import Endpoint, Worker
from services.endpoints.store import EndpointStore
from tests.services.endpoints.conftest import STANDIN_WORKER, Peers, RunLoop, StartService, is_alive, until

Create = Callable[..., Awaitable[Endpoint]]


@pytest.fixture
def create(domain: Endpoints) -> Create:
    async def make(name: str = "test", num_workers: int = 1, role: str = "painter") -> Endpoint:
        new = NewEndpoint(name, "Async", "any", num_workers, False, 0, 1, [role])
        return await domain.create_endpoint(new, "ann")

    return make


@pytest.fixture
def endpoint_in(store: EndpointStore) -> Callable[..., Awaitable[Endpoint]]:
    """Waits until the only endpoint has the status and so many live workers."""

    async def wait(status: str, num_live: int = 1) -> Endpoint:
        async def found() -> list[Endpoint]:
            rows = await store.get_all()
            return [row for row in rows if (row.status, row.num_live) == (status, num_live)]

        return (await until(found))[0]

    return wait


def mode_and_text(path: Path) -> tuple[int, str]:
    return stat.S_IMODE(path.stat().st_mode), path.read_text()


def environment_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(line.split("=", 1) for line in lines if line)


async def worker_of(store: EndpointStore, endpoint: Endpoint) -> Worker:
    (worker,) = [row for row in await store.get_workers() if row.endpoint_id == endpoint.id]
    return worker


async def another_process(store: EndpointStore, endpoint: Endpoint, pid: int | None) -> Worker:
    """The endpoint's worker, once it is live with another process than this."""

    async def found() -> Worker | None:
        worker = await worker_of(store, endpoint)
        return worker if worker.was_live and worker.pid not in (None, pid) else None

    return await until(found)


async def test_a_created_endpoint_comes_into_service_when_its_workers_reach_the_queue(
    run_loop: RunLoop, create: Create, endpoint_in: Any, peers: Peers, store: EndpointStore, tmp_path: Path
) -> None:
    run_loop()
    created = await create(num_workers=2)
    endpoint = await endpoint_in("InService", 2)
    assert endpoint.end_time > created.start_time
    assert peers.queue.workers[endpoint.id] == {f"{endpoint.id}-0-1", f"{endpoint.id}-1-1"}
    assert mode_and_text(tmp_path / "workers" / endpoint.id / "secret") == (0o600, peers.identity.secrets[endpoint.id])


async def test_a_worker_gets_no_credentials_but_its_own(
    run_loop: RunLoop, create: Create, store: EndpointStore, endpoint_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ESD_DATABASE_URL", "ESD_S3_SECRET_KEY_FILE", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "not for workers")
    run_loop()
    await create()
    worker = await worker_of(store, await endpoint_in("InService"))
    environment = environment_of(worker.pid)
    assert environment["ESD_WORKER_ID"] == worker.worker_id
    assert float(environment["ESD_DRAIN_SECONDS"]) > 0
    assert "not for workers" not in environment.values()


async def test_a_killed_worker_is_started_again(
    run_loop: RunLoop, create: Create, store: EndpointStore, endpoint_in: Any
) -> None:
    run_loop()
    await create()
    endpoint = await endpoint_in("InService")
    worker = await another_process(store, endpoint, None)
    os.kill(worker.pid, signal.SIGKILL)
    again = await another_process(store, endpoint, worker.pid)
    assert (again.num_launches, again.num_failures) == (2, 0)
    assert (await endpoint_in("InService")).end_time == endpoint.end_time


async def test_a_restarted_loop_adopts_the_workers_and_watches_them(
    run_loop: RunLoop, create: Create, store: EndpointStore, endpoint_in: Any
) -> None:
    first = run_loop()
    await create()
    endpoint = await endpoint_in("InService")
    worker = await another_process(store, endpoint, None)
    await first.stop()
    run_loop()
    await create("other", role="poet")
    await until(lambda: both_in_service(store))
    assert (await worker_of(store, endpoint)).pid == worker.pid
    os.kill(worker.pid, signal.SIGKILL)
    await another_process(store, endpoint, worker.pid)


async def both_in_service(store: EndpointStore) -> bool:
    return [row.status for row in await store.get_all()] == ["InService", "InService"]


async def test_a_worker_that_ended_while_nobody_watched_is_started_again_without_blame(
    run_loop: RunLoop, create: Create, store: EndpointStore, endpoint_in: Any
) -> None:
    first = run_loop()
    await create()
    endpoint = await endpoint_in("InService")
    worker = await another_process(store, endpoint, None)
    await first.stop()
    os.kill(worker.pid, signal.SIGKILL)
    await until(lambda: not is_alive(worker.pid))
    run_loop()
    again = await another_process(store, endpoint, worker.pid)
    assert again.num_failures == 0


async def test_two_loops_run_one_set_of_workers_and_the_second_takes_over(
    run_loop: RunLoop, create: Create, store: EndpointStore, endpoint_in: Any, peers: Peers
) -> None:
    loops = [run_loop(), run_loop()]
    await create(num_workers=2)
    endpoint = await endpoint_in("InService", 2)
    workers = await store.get_workers()
    assert [worker.num_launches for worker in workers] == [1, 1]
    assert len(peers.queue.workers[endpoint.id]) == 2
    (leader,) = [loop for loop in loops if loop.cluster._machine.processes._watched]
    await leader.stop()
    os.kill(workers[0].pid, signal.SIGKILL)

    async def replaced() -> bool:
        rows = await store.get_workers()
        return [row.num_launches for row in rows] == [2, 1] and all(row.was_live for row in rows)

    await until(replaced)
    assert [row.pid for row in await store.get_workers()][1] == workers[1].pid


async def test_three_failed_starts_make_the_endpoint_failed_with_the_reason(
    run_loop: RunLoop, create: Create, store: EndpointStore, endpoint_in: Any, peers: Peers
) -> None:
    run_loop(["/bin/sh", "-c", "echo no CUDA here; exit 3"])
    await create()
    endpoint = await endpoint_in("Failed", 0)
    sentence = "a worker failed to start 3 times in a row; the last one ended with code 3: no CUDA here"
    assert endpoint.error == sentence
    (retired,) = await until(lambda: peers.queue.retired)
    assert retired == (endpoint.id, f"endpoint esd-async-test failed: {sentence}")

    async def no_workers() -> bool:
        return await store.get_workers() == []

    await until(no_workers)


async def test_a_deleted_endpoint_leaves_nothing(
    run_loop: RunLoop,
    create: Create,
    domain: Endpoints,
    store: EndpointStore,
    endpoint_in: Any,
    peers: Peers,
    tmp_path: Path,
) -> None:
    run_loop()
    await create()
    endpoint = await endpoint_in("InService")
    worker = await worker_of(store, endpoint)
    await peers.queue.set_jobs(endpoint.id, num_queued=3)
    await domain.delete_endpoints([endpoint.name])
    await create()  # name and role are free at once
    await until(lambda: endpoint.id not in peers.identity.secrets)
    await until(lambda: is_gone(store, endpoint))
    assert not is_alive(worker.pid)
    assert (endpoint.id, "endpoint esd-async-test was deleted") in peers.queue.retired
    assert endpoint.id not in peers.queue.jobs
    assert not (tmp_path / "workers" / endpoint.id).exists()
    await endpoint_in("InService")


async def is_gone(store: EndpointStore, endpoint: Endpoint) -> bool:
    return endpoint.id not in [row.id for row in await store.get_all()]


async def test_a_worker_that_does_not_end_in_time_is_killed(
    run_loop: RunLoop, create: Create, domain: Endpoints, store: EndpointStore, endpoint_in: Any
) -> None:
    run_loop([*STANDIN_WORKER, "--stubborn"], stop_seconds=0.5)
    await create()
    endpoint = await endpoint_in("InService")
    worker = await worker_of(store, endpoint)
    await domain.delete_endpoints([endpoint.name])
    await until(lambda: is_gone(store, endpoint))
    assert not is_alive(worker.pid)


async def test_gpus_are_shared_out(run_loop: RunLoop, create: Create, store: EndpointStore, endpoint_in: Any) -> None:
    run_loop(gpus=("0", "1"))
    await create(num_workers=2)
    await endpoint_in("InService", 2)
    workers = await store.get_workers()
    assert [worker.gpu for worker in workers] == ["0", "1"]
    for worker in workers:
        assert environment_of(worker.pid)["CUDA_VISIBLE_DEVICES"] == worker.gpu


async def test_a_worker_does_not_outlive_the_launcher(
    run_loop: RunLoop, create: Create, store: EndpointStore, endpoint_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = await asyncio.create_subprocess_exec("sleep", "600")
    monkeypatch.setenv("ESD_LAUNCHER_PID", str(launcher.pid))
    loop = run_loop()
    await create()
    worker = await worker_of(store, await endpoint_in("InService"))
    await loop.stop()
    assert is_alive(worker.pid)
    launcher.kill()
    await launcher.wait()
    await until(lambda: not is_alive(worker.pid))


@pytest.mark.slow
async def test_workers_survive_the_service_that_started_them_and_are_adopted_by_the_next(
    start_service: StartService, store: EndpointStore, create: Create, endpoint_in: Any
) -> None:
    first = await start_service()
    await create()
    endpoint = await endpoint_in("InService")
    worker = await another_process(store, endpoint, None)
    first.kill()
    await first.wait()
    second = await start_service()
    os.kill(worker.pid, signal.SIGKILL)  # whether before or after the adoption, the new service replaces it
    again = await another_process(store, endpoint, worker.pid)
    second.terminate()
    assert await second.wait() == 0
    third = await start_service()
    await create("other", role="poet")
    await until(lambda: both_in_service(store))
    assert (await worker_of(store, endpoint)).pid == again.pid
    third.terminate()
    assert await third.wait() == 0


async def test_the_queue_is_told_what_is_pinned_and_again_when_it_did_not_hear(
    run_loop: RunLoop, create: Create, domain: Endpoints, endpoint_in: Any, store: EndpointStore, peers: Peers
) -> None:
    ann = Viewer("ann", ["painter"])
    endpoint = await create()
    await domain.update_endpoint(endpoint.id, Change(pinned=("for-all.safetensors",)), ann)
    run_loop()
    await until(lambda: peers.queue.pinned.get(endpoint.id) == ["for-all.safetensors"])
    await endpoint_in("InService")
    await domain.update_endpoint(endpoint.id, Change(pinned=("for-painters.ckpt",)), ann)
    await until(lambda: peers.queue.pinned[endpoint.id] == ["for-painters.ckpt"])
    await domain.delete_endpoints([endpoint.name])
    await until(lambda: is_gone(store, endpoint))
    assert peers.queue.pinned[endpoint.id] == []
