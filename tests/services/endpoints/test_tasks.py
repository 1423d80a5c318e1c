"""Tasks as processes of this machine: begun, begun again, stopped, adopted, and who waits for whom."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import pytest
from structlog.testing import capture_logs

from esd.endpoints.v1 import endpoints_pb2 as pb
from esd.endpoints.v1 import endpoints_pb2_grpc as rpc
from services.common.database import Database
from services.endpoints.domain import Endpoints, NewEndpoint
from services.endpoints.event_store import EventStore
from services.endpoints.store import EndpointStore
from services.endpoints.task_servicer import TaskServicer
from services.endpoints.task_store import TaskStore
from services.endpoints.tasks import Tasks
from tests.processes import ROOT
from tests.services.endpoints.conftest import Peers, RunLoop, StartService, is_alive, until
from tests.services.endpoints.foreman import Foreman, worker_or_task
from tests.serving import Metadata

WAITING, RUNNING = pb.TASK_STATE_WAITING, pb.TASK_STATE_RUNNING
SUCCEEDED, FAILED, STOPPED = pb.TASK_STATE_SUCCEEDED, pb.TASK_STATE_FAILED, pb.TASK_STATE_STOPPED


@pytest.fixture
async def tasks(task_store: TaskStore, serve: Callable[..., Awaitable[Any]]) -> rpc.TaskServiceStub:
    servicer = TaskServicer(Tasks(task_store))
    return rpc.TaskServiceStub(await serve(lambda server: rpc.add_TaskServiceServicer_to_server(servicer, server)))


@pytest.fixture
def training(service_token: Callable[[str], Metadata]) -> Metadata:
    return service_token("training")


Start = Callable[..., Awaitable[str]]


@pytest.fixture
def begin(tasks: rpc.TaskServiceStub, training: Metadata) -> Start:
    """Asks for a task and answers its id."""

    async def start(**values: Any) -> str:
        task_id = str(uuid4())
        request = pb.StartTaskRequest(task_id=task_id, kind=pb.TASK_KIND_TRAIN, **values)
        await tasks.StartTask(request, metadata=training)
        return task_id

    return start


Reach = Callable[..., Awaitable[pb.Task]]


@pytest.fixture
def reach(tasks: rpc.TaskServiceStub, training: Metadata) -> Reach:
    """Waits until the task is in the state, with a reason that contains the words."""

    async def wait(task_id: str, state: pb.TaskState, words: str = "") -> pb.Task:
        async def found() -> pb.Task | None:
            task = (await tasks.GetTask(pb.GetTaskRequest(task_id=task_id), metadata=training)).task
            return task if task.state == state and words in task.reason else None

        return await until(found)

    return wait


@pytest.fixture
def stop(tasks: rpc.TaskServiceStub, training: Metadata) -> Callable[[str], Awaitable[None]]:
    async def send(task_id: str) -> None:
        await tasks.StopTask(pb.StopTaskRequest(task_id=task_id), metadata=training)

    return send


async def test_a_task_runs_the_workers_command_with_its_own_secret_and_leaves_nothing(
    run_loop: RunLoop, foreman: Foreman, begin: Start, reach: Reach, peers: Peers, tmp_path: Path
) -> None:
    run_loop(foreman.command)
    task_id = await begin(instance_type="any")
    said, end = await foreman.next(task_id)
    assert said["word"] == "train"
    assert said["secret"] == peers.identity.trainers[task_id]
    assert said["environment"]["ESD_SERVER_URL"] == f"http://{peers.address}"
    assert not {"ESD_DATABASE_URL", "ESD_WORKER_ID", "CUDA_VISIBLE_DEVICES"} & set(said["environment"])
    await reach(task_id, RUNNING)
    end()
    task = await reach(task_id, SUCCEEDED)
    assert (task.num_attempts, task.reason) == (1, "")
    await until(lambda: not (tmp_path / "workers" / task_id).exists())
    assert peers.identity.trainers == {}


async def test_a_task_that_fails_is_begun_again_as_often_as_it_may_and_its_last_words_are_the_reason(
    run_loop: RunLoop, foreman: Foreman, begin: Start, reach: Reach
) -> None:
    run_loop(foreman.command)
    task_id = await begin(max_attempts=2)
    _, end = await foreman.next(task_id)
    end(3, "the first loss is nan")
    await reach(task_id, WAITING, "attempt 1 of 2 failed: it ended with code 3: the first loss is nan")
    said, _ = await foreman.next(task_id)
    os.kill(said["pid"], signal.SIGKILL)
    task = await reach(task_id, FAILED)
    assert (task.num_attempts, task.reason) == (2, "it was ended by signal 9: its log is empty")


@pytest.mark.slow
async def test_an_attempt_that_was_interrupted_does_not_count(
    run_loop: RunLoop, foreman: Foreman, begin: Start, reach: Reach
) -> None:
    run_loop(foreman.command)
    task_id = await begin(max_attempts=2)
    for code, words in (
        (5, "attempt 1 was interrupted"),
        (3, "attempt 1 of 2 failed: it ended with code 3"),
        (5, "attempt 3 was interrupted"),
    ):
        _, end = await foreman.next(task_id)
        end(code)
        await reach(task_id, WAITING, words)
    _, end = await foreman.next(task_id)
    end(3)
    assert (await reach(task_id, FAILED)).num_attempts == 4


@pytest.mark.parametrize("how", ["--stubborn", "--importing"])
async def test_an_attempt_that_ends_with_its_machine_does_not_count_however_it_ends(
    run_loop: RunLoop, foreman: Foreman, begin: Start, reach: Reach, task_store: TaskStore, tmp_path: Path, how: str
) -> None:
    """As `esd up` ends it, while no control loop runs: SIGTERM for every process, SIGKILL for who is left."""
    loop = run_loop([*foreman.command, how])
    task_id = await begin(max_attempts=1)
    said, _ = await foreman.next(task_id)
    await loop.stop()
    [task] = await task_store.get_uncleared()
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in (task.pid, said["pid"]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        await until((tmp_path / "workers" / task_id / "attempt-1.exit").exists)
    await until(lambda: not is_alive(said["pid"]) and not is_alive(task.pid))
    run_loop(foreman.command)
    await reach(task_id, WAITING, "attempt 1 was interrupted, which counts for none")
    await foreman.next(task_id)


@pytest.mark.slow
async def test_a_service_that_keeps_no_workers_has_tasks_leave_before_it_ends_which_costs_them_no_attempt(
    start_service: StartService, service_environment: dict[str, str], foreman: Foreman, begin: Start
) -> None:
    service_environment |= {"ESD_KEEP_WORKERS": "false", "ESD_WORKER_COMMAND": json.dumps(foreman.command)}
    service = await start_service()
    task_id = await begin(max_attempts=1)
    said, _ = await foreman.next(task_id)
    service.terminate()
    assert await service.wait() == 0
    assert not is_alive(said["pid"])
    await start_service()
    await foreman.next(task_id)


async def test_a_task_that_is_asked_to_leave_leaves(
    run_loop: RunLoop, foreman: Foreman, begin: Start, reach: Reach, stop: Any
) -> None:
    run_loop(foreman.command)
    task_id = await begin()
    await foreman.next(task_id)
    await stop(task_id)
    assert (await reach(task_id, STOPPED)).num_attempts == 1
    await stop(task_id)  # again, and nothing happens


async def test_a_task_that_does_not_leave_in_time_is_killed_with_what_it_started_and_has_not_failed(
    run_loop: RunLoop, foreman: Foreman, begin: Start, reach: Reach, stop: Any
) -> None:
    run_loop([*foreman.command, "--stubborn"], stop_seconds=0.5)
    task_id = await begin()
    said, _ = await foreman.next(task_id)
    with capture_logs() as logs:
        await stop(task_id)
        await reach(task_id, STOPPED)
    assert [line["event"] for line in logs if line["log_level"] == "warning"] == []
    await until(lambda: not is_alive(said["pid"]))


async def test_a_task_that_waits_can_be_stopped_before_it_begins(
    run_loop: RunLoop, foreman: Foreman, begin: Start, reach: Reach, stop: Any
) -> None:
    run_loop(foreman.command, max_cpu_tasks=0)
    task_id = await begin()
    await reach(task_id, WAITING, "it waits until fewer than 0 other tasks run")
    await stop(task_id)
    assert (await reach(task_id, STOPPED)).num_attempts == 0
    assert not foreman.has_met(task_id)


@pytest.mark.slow
async def test_a_task_that_takes_longer_than_its_deadline_fails(
    run_loop: RunLoop, foreman: Foreman, begin: Start, reach: Reach
) -> None:
    run_loop(foreman.command)
    task_id = await begin(max_attempts=3, deadline_seconds=5)
    said, _ = await foreman.next(task_id)
    task = await reach(task_id, FAILED)
    assert (task.num_attempts, task.reason) == (1, "it took longer than its 5 seconds")
    assert not is_alive(said["pid"])


async def test_without_gpus_so_many_tasks_run_at_a_time_as_the_setting_says_the_oldest_first(
    run_loop: RunLoop, foreman: Foreman, begin: Start, reach: Reach
) -> None:
    run_loop(foreman.command, max_cpu_tasks=2)
    first, second, third, fourth = [await begin() for _ in range(4)]
    _, end = await foreman.next(first)
    await foreman.next(second)
    await reach(third, WAITING, "it waits until fewer than 2 other tasks run")
    assert not foreman.has_met(third)
    end()
    await foreman.next(third)
    assert not foreman.has_met(fourth)


@pytest.fixture
def endpoint(domain: Endpoints) -> Callable[..., Awaitable[Any]]:
    async def make(num_workers: int) -> Any:
        return await domain.create_endpoint(NewEndpoint("a", "Async", "any", num_workers, False, 0, 1, ["painter"]), "")

    return make


async def gpus_of_workers(store: EndpointStore) -> list[str]:
    return [worker.gpu for worker in await store.get_workers() if worker.pid and worker.gpu]


async def test_a_task_waits_for_a_gpu_that_no_worker_has_and_workers_stay_away_from_its_own(
    run_loop: RunLoop, foreman: Foreman, begin: Start, reach: Reach, store: EndpointStore,
    domain: Endpoints, endpoint: Any, peers: Peers,
) -> None:  # fmt: skip
    run_loop(worker_or_task(foreman), gpus=("0", "1"))
    pool = await endpoint(1)
    await until(lambda: peers.queue.workers.get(pool.id))
    first = await begin()
    said, end = await foreman.next(first)
    assert said["environment"]["CUDA_VISIBLE_DEVICES"] == "1"
    second = await begin()
    await reach(second, WAITING, "it waits for a GPU: all 2 are in use")
    end()
    said, _ = await foreman.next(second)
    assert said["environment"]["CUDA_VISIBLE_DEVICES"] == "1"
    assert await gpus_of_workers(store) == ["0"]
    third = await begin()
    await reach(third, WAITING, "all 2 are in use")
    await domain.delete_endpoints([pool.name])
    said, _ = await foreman.next(third)
    assert said["environment"]["CUDA_VISIBLE_DEVICES"] == "0"


async def test_where_tasks_go_first_a_worker_leaves_its_gpu_and_comes_back_to_it(
    run_loop: RunLoop, foreman: Foreman, begin: Start, reach: Reach, store: EndpointStore,
    endpoint: Any, peers: Peers, database: Database,
) -> None:  # fmt: skip
    run_loop(worker_or_task(foreman), gpus=("0",), tasks_first=True)
    pool = await endpoint(1)
    await until(lambda: peers.queue.workers.get(pool.id))
    task_id = await begin()
    _, end = await foreman.next(task_id)
    assert await gpus_of_workers(store) == []
    await until(lambda: not peers.queue.workers[pool.id])

    async def told() -> list[str]:
        events = await EventStore(database).page_events(pool.id, 100, None)
        return [event.message for event in events if event.type == "WorkerWaits"]

    assert await until(told) == ["a worker has not started: it waits for a GPU: tasks have all 1"]
    end()
    await reach(task_id, SUCCEEDED)
    await until(lambda: peers.queue.workers[pool.id])
    assert len(await told()) == 1  # however often the control loop has looked
    (worker,) = await store.get_workers()
    assert worker.num_failures == 0  # it left because it was asked to


@pytest.mark.slow
async def test_tasks_survive_the_service_and_how_they_ended_is_known_whoever_watched(
    service_environment: dict[str, str], foreman: Foreman, begin: Start, reach: Reach
) -> None:
    environment = service_environment | {"ESD_WORKER_COMMAND": json.dumps(foreman.command), "ESD_MAX_CPU_TASKS": "3"}
    service = [sys.executable, "-m", "services.endpoints"]
    first = await asyncio.create_subprocess_exec(*service, env=environment, cwd=ROOT)
    ids = [await begin() for _ in range(3)]
    done_between, done_after, failed_between = [await foreman.next(task_id) for task_id in ids]
    first.kill()
    await first.wait()
    done_between[1](0)
    failed_between[1](4, "out of memory")
    await until(lambda: not is_alive(done_between[0]["pid"]) and not is_alive(failed_between[0]["pid"]))
    second = await asyncio.create_subprocess_exec(*service, env=environment, cwd=ROOT)
    await reach(ids[0], SUCCEEDED)
    assert (await reach(ids[2], FAILED)).reason == "it ended with code 4: out of memory"
    assert is_alive(done_after[0]["pid"])
    done_after[1](0)
    assert (await reach(ids[1], SUCCEEDED)).num_attempts == 1
    second.terminate()
    assert await second.wait() == 0


async def test_a_task_does_not_outlive_the_launcher(
    run_loop: RunLoop, foreman: Foreman, begin: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = await asyncio.create_subprocess_exec("sleep", "600")
    monkeypatch.setenv("ESD_LAUNCHER_PID", str(launcher.pid))
    loop = run_loop(foreman.command)
    said, _ = await foreman.next(await begin())
    await loop.stop()
    assert is_alive(said["pid"])
    launcher.kill()
    await launcher.wait()
    await until(lambda: not is_alive(said["pid"]))


async def test_two_loops_begin_a_task_once(run_loop: RunLoop, foreman: Foreman, begin: Start, reach: Reach) -> None:
    loops = [run_loop(foreman.command), run_loop(foreman.command)]
    task_id = await begin()
    _, end = await foreman.next(task_id)
    (leader,) = [loop for loop in loops if loop.cluster._machine.processes._watched]
    await leader.stop()
    end()
    assert (await reach(task_id, SUCCEEDED)).num_attempts == 1
    assert not foreman.has_met(task_id)


async def test_a_task_is_asked_for_once(tasks: rpc.TaskServiceStub, training: Metadata, begin: Start) -> None:
    task_id = await begin(max_attempts=2)
    again = pb.StartTaskRequest(task_id=task_id, kind=pb.TASK_KIND_TRAIN, max_attempts=5)
    answers = await asyncio.gather(*(tasks.StartTask(again, metadata=training) for _ in range(4)))
    assert [answer.task for answer in answers] == [pb.Task(task_id=task_id, state=WAITING)] * 4


async def test_a_task_belongs_to_the_service_that_runs_its_kind(
    tasks: rpc.TaskServiceStub, begin: Start, service_token: Callable[[str], Metadata], admin: Metadata, peers: Peers
) -> None:
    task_id = await begin()
    start = pb.StartTaskRequest(task_id=str(uuid4()), kind=pb.TASK_KIND_TRAIN)
    denied, missing = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.NOT_FOUND
    models = service_token("models")
    assert await status_of(tasks.StartTask(start, metadata=models)) == denied
    assert await status_of(tasks.StartTask(start, metadata=admin)) == denied
    assert await status_of(tasks.GetTask(pb.GetTaskRequest(task_id=task_id), metadata=models)) == missing
    assert await status_of(tasks.StopTask(pb.StopTaskRequest(task_id=task_id), metadata=models)) == missing
    unknown = pb.GetTaskRequest(task_id=str(uuid4()))
    assert await status_of(tasks.GetTask(unknown, metadata=service_token("training"))) == missing


async def status_of(call: Awaitable[Any]) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    return failed.value.code()
