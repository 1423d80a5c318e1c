"""Whatever users, workers and replicas do, in any order and at once: no job is lost, and none is done twice.

A seed is a program of rounds, and all actions of a round happen at once. What becomes of the jobs is in a journal that
PostgreSQL keeps of every change of their rows; it is judged at the end, with what users and workers were told.
"""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import grpc
import psycopg
import pytest

from esd.inference.v1 import inference_pb2 as pb
from services.common.tasks import together
from services.inference.channels import JOB_ENDED, POOLS_CHANGED
from services.inference.queue.domain import Limits
from services.inference.rows import ASYNC, REAL_TIME, Job
from services.inference.states import State
from services.inference.submitting.quotas import Quotas
from tests.services.inference.any_worker import STOPPED, AnyWorker, result_of
from tests.services.inference.conftest import Replica, Service, World
from tests.services.inference.journal import DEADLINE_SECONDS, JOURNAL, LEASED, MAX_QUEUED, judge

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

NUM_ROUNDS = 50
MAX_AT_ONCE = 6
RECENT = 5  # of all that somebody knows, so many of the last are acted on
QUIET_SECONDS = 60.0  # within which all is done that is left, but for a hole in the product
USERS = ("ann", "bob")
PAYLOAD = '{"prompt": "a cat", "steps": 2}'
Code = grpc.StatusCode
# How likely each is; every seed has its favourites among them.
ACTIONS = {
    **{"create": 6, "hurry": 1, "start": 4, "cancel": 1, "delete": 1, "retire": 0.5},
    **{"connect": 4, "want": 8, "begin": 6, "finish": 4, "fail": 1, "leave": 1, "vanish": 3},
    **{"silence": 1, "restart": 0.5},
}
UNDER_WAY = "SELECT id, endpoint_id, worker_id, lease_id, is_running, num_lost FROM job WHERE status = 'inprogress'"


@pytest.fixture
def limits() -> Limits:
    """Leases end soon, by themselves too; any worker may lose any job at any time."""
    return Limits(lease_seconds=1.0, renew_seconds=0.1, grace_seconds=0.05, sweep_seconds=3600.0, retry_seconds=0.1)


@pytest.fixture
def quotas() -> Quotas:
    return Quotas(max_queued_jobs=MAX_QUEUED)


@dataclass
class Play:
    """Two replicas, two users with their jobs, and workers. An action's numbers say who acts, and on which thing."""

    replica: Replica
    database: psycopg.AsyncConnection[Any]
    tasks: asyncio.TaskGroup
    workers: list[AnyWorker]
    stack: AsyncExitStack
    running: list[tuple[Service, asyncio.Event, AsyncExitStack]] = field(default_factory=list)
    jobs: dict[str, tuple[str, str]] = field(default_factory=dict)  # owner and type, by id
    deleted: set[str] = field(default_factory=set)
    waiting: list[asyncio.Future[list[Any]]] = field(default_factory=list)  # for the end of Real-time jobs

    async def open(self) -> None:
        stopping, stack = asyncio.Event(), await self.stack.enter_async_context(AsyncExitStack())
        self.running.append((await stack.enter_async_context(self.replica(stopping)), stopping, stack))

    def service(self, number: int) -> Service:
        return self.running[number // 2 % len(self.running)][0]

    async def rows(self, query: str) -> list[Any]:
        return await (await self.database.execute(query)).fetchall()

    def is_running(self, service: Service) -> bool:
        return any(service is each for each, *_ in self.running)

    async def ask(self, who: int, rpc: str, request: Any, *refusals: grpc.StatusCode) -> Any:
        """A replica's answer, or another's where it stops; None where it is one of the refusals."""
        key = ("idempotency-key", str(uuid4()))
        while True:
            service = self.service(who)
            stub, caller = service.jobs, service.user(USERS[who % 2])
            if rpc == "RetireEndpoint":
                stub, caller = service.queue, service.tokens.service("endpoints")
            try:
                return await getattr(stub, rpc)(request, metadata=(*caller, key))
            except grpc.aio.AioRpcError as error:
                if error.code() not in STOPPED or self.is_running(service):
                    assert error.code() in refusals, f"{rpc}: {error.code()} {error.details()}"  # noqa: PT017
                    return None
            except asyncio.CancelledError:
                if self.is_running(service):  # else its channel was closed
                    raise

    def job_of(self, who: int, which: int) -> str:
        """One of the user's last jobs, or none that there is."""
        mine = [job_id for job_id, (owner, _) in self.jobs.items() if owner == USERS[who % 2]][-RECENT:]
        return mine[which % len(mine)] if mine else str(uuid4())

    def worker(self, who: int) -> AnyWorker:
        return self.workers[who % len(self.workers)]

    def lease_of(self, who: int, which: int) -> str:
        """A lease that the worker has, or one of the last that it had; empty when there is none."""
        worker = self.worker(who)
        last = list(worker.held if which % 4 else worker.known)[-RECENT:]
        return last[which % len(last)] if last else ""

    # --- what users do ---

    async def create(self, who: int, which: int) -> None:
        kind = REAL_TIME if which % 3 == 0 else ASYNC
        models = {"Stable-diffusion": ["v1-5.safetensors"]}
        request = pb.CreateInferenceJobRequest(task_type="txt2img", inference_type=kind, models=models)
        if kind == ASYNC and which % 2:
            request.payload_string = PAYLOAD  # which starts it
        if which % 8 == 0:
            request.deadline_seconds = DEADLINE_SECONDS
        if answer := await self.ask(who, "CreateInferenceJob", request, Code.RESOURCE_EXHAUSTED):
            receipt = answer.inference
            if receipt.id:
                await self.service(who).upload(receipt, PAYLOAD.encode())
            self.jobs[receipt.id or receipt.inference_id] = (USERS[who % 2], kind)

    async def hurry(self, who: int, which: int) -> None:
        """More jobs at once than may wait."""
        await asyncio.gather(*(self.create(who, 1) for _ in range(MAX_QUEUED + 1)))

    async def start(self, who: int, which: int) -> None:
        job_id = self.job_of(who, which)
        request = pb.StartInferenceJobRequest(job_id=job_id)
        refusals = (Code.RESOURCE_EXHAUSTED, Code.INVALID_ARGUMENT, Code.FAILED_PRECONDITION)
        starts = (self.ask(who, "StartInferenceJob", request, *refusals) for _ in range(1 + which % 2))
        answers = asyncio.gather(*starts)
        if self.jobs.get(job_id, ("", ""))[1] == REAL_TIME:
            self.waiting.append(answers)
        else:
            await answers

    async def cancel(self, who: int, which: int) -> None:
        request = pb.CancelInferenceJobRequest(job_id=self.job_of(who, which))
        answer = await self.ask(who, "CancelInferenceJob", request, Code.FAILED_PRECONDITION, Code.NOT_FOUND)
        assert answer is None or answer.data.status == "failed"

    async def delete(self, who: int, which: int) -> None:
        job_ids = [self.job_of(who, which), self.job_of(who, which + 1)]
        await self.ask(who, "DeleteInferenceJobs", pb.DeleteInferenceJobsRequest(inference_id_list=job_ids))
        self.deleted.update(job_ids)
        for job_id in job_ids:  # by the other replica
            request = pb.GetInferenceJobRequest(job_id=job_id)
            assert await self.ask(who + 2, "GetInferenceJob", request, Code.NOT_FOUND) is None

    async def retire(self, who: int, which: int) -> None:
        """What waits at an endpoint moves to the other one, or back, as it is there all the same."""
        endpoint_id = self.service(who).world.endpoints[which % 2].id
        await self.ask(who, "RetireEndpoint", pb.RetireEndpointRequest(endpoint_id=endpoint_id, reason="not wanted"))

    # --- what workers do ---

    async def connect(self, who: int, which: int) -> None:
        await self.worker(who).connect(self.service(which), is_new=which % 2 == 0)

    async def want(self, who: int, which: int) -> None:
        """Says so, and connects again before if that is necessary."""
        if self.worker(who).has_ended:
            await self.worker(who).connect(self.service(which))
        self.worker(who).say(want={"num_jobs": which % 5})

    async def begin(self, who: int, which: int) -> None:
        for lease_id in (*self.worker(who).held, self.lease_of(who, 0)):
            if lease_id:
                self.worker(who).begin(lease_id)

    async def finish(self, who: int, which: int) -> None:
        if lease_id := self.lease_of(who, which):
            await self.worker(who).end(self.service(who), lease_id, "done")

    async def fail(self, who: int, which: int) -> None:
        if lease_id := self.lease_of(who, which):
            await self.worker(who).end(
                self.service(who), lease_id, ("failed", "cancelled", "postponed", "declined")[which % 4]
            )

    async def leave(self, who: int, which: int) -> None:
        self.worker(who).close()

    async def vanish(self, who: int, which: int) -> None:
        for call in self.worker(who).calls[-1:]:
            call.cancel()

    # --- what happens to them ---

    async def silence(self, who: int, which: int) -> None:
        """A replica takes a worker for lost."""
        query = "DELETE FROM worker WHERE worker_id = %s"
        await self.database.execute(query, (self.worker(who).name,))

    async def restart(self, who: int, which: int) -> None:
        """One replica ends, told so before or not, and another one begins."""
        if len(self.running) == 2:
            _, stopping, stack = self.running.pop(who % 2)
            if which % 2:
                stopping.set()
            await stack.aclose()
            await self.open()

    # --- the end ---

    async def until_none(self, channel: str, query: str) -> None:
        """Waits until there is no such row, by the service's own notifications."""
        with self.service(0).notifications.subscribed((channel, "")) as changed:
            try:
                async with asyncio.timeout(QUIET_SECONDS):
                    while await self.rows(query):
                        await changed.wait()
                        changed.clear()
            except TimeoutError:
                workers = {f"{each.name} at {each.endpoint_id}": list(each.held) for each in self.workers}
                pytest.fail(f"left over: {await self.rows(query)}, while workers hold {workers}")

    async def come_to_rest(self) -> None:
        """All replicas are replaced, and one worker is never heard of again. The others do all that there is to do."""
        await self.want(0, 4)
        for call in [call for worker in self.workers for call in worker.calls[:-1]]:
            call.cancel()  # the dead ones are noticed at last
        for _ in range(2):
            await self.restart(0, 1)
        working = [self.tasks.create_task(worker.work(self.service(0))) for worker in self.workers[1:]]
        await self.until_none(JOB_ENDED, UNDER_WAY)
        for answers in await asyncio.gather(*self.waiting):
            assert all(answer is None or answer.data.status == "succeed" for answer in answers)
        for task in working:
            task.cancel()
        for call in [call for worker in self.workers for call in worker.calls]:
            call.cancel()
        await self.until_none(POOLS_CHANGED, "SELECT endpoint_id, worker_id FROM worker")


async def check(play: Play) -> None:
    """Whether what was told and what is left agrees with the journal."""
    last: dict[str, Job | None] = {}
    leases: list[str] = []
    ended: dict[str, State] = {}  # by lease
    begun = {lease_id for worker in play.workers for lease_id in worker.begun}
    said = {lease_id: how for worker in play.workers for lease_id, how in worker.last_words.items()}
    query = "SELECT old, new, waiting, beside FROM journal ORDER BY number"
    for before, after, waiting, beside in await play.rows(query):
        old, new = (Job(**row) if row else None for row in (before, after))
        last[(before or after)["id"]] = new
        if new is None:
            continue
        judge(old, new, waiting, beside, said.get(str(old.lease_id) if old else "", ""))
        assert new.state != State.RUNNING or str(new.lease_id) in begun or new.is_last_attempt
        assert new.state != State.SUCCEED or said[str(new.result_lease)] == "done"
        if old is not None and old.state in LEASED and new.state not in LEASED:
            ended[str(old.lease_id)] = new.state
        if old is not None and old.state != new.state == State.HELD:
            leases.append(str(new.lease_id))
    assert len(leases) == len(set(leases))
    assert set(last) == set(play.jobs)
    assert {job_id for job_id, job in last.items() if job is None} == play.deleted & set(last)
    for lease_id in {lease_id for worker in play.workers for lease_id in worker.recorded}:
        told = {"done": State.SUCCEED, "failed": State.FAILED}.get(said[lease_id])
        assert told is None or ended[lease_id] == told
    leftovers = tuple(prefix for (prefix,) in await play.rows("SELECT prefix FROM leftover"))
    for number, user in enumerate(USERS):
        mine = {job_id: last[job_id] for job_id, (owner, _) in play.jobs.items() if owner == user}
        wanted = pb.ListInferenceJobsRequest(username=user, limit="0")
        listed = (await play.ask(number, "ListInferenceJobs", wanted)).inferences
        assert {job.id: job.status for job in listed} == {id_: job.status for id_, job in mine.items() if job}
        for job_id, job in mine.items():
            for blob in await play.service(0).blobs.find(f"out/{job_id}/"):
                is_result = job is not None and job.status == "succeed" and blob.key.startswith(job.result_prefix)
                assert is_result or blob.key.startswith(leftovers), blob.key
            if job is not None:
                await check_view(play, number, job)


async def check_view(play: Play, who: int, job: Job) -> None:
    """Whether both replicas show the job to its owner as it is."""
    for replica in (0, 2):
        request = pb.GetInferenceJobRequest(job_id=str(job.id))
        shown = (await play.ask(who + replica, "GetInferenceJob", request)).data
        assert (shown.status, shown.sagemaker_raw.string_value) == (job.status, job.failure or "")
        if job.status == "succeed":
            (url,) = (value.string_value for value in shown.img_presigned_urls.values)
            assert (await play.service(0).http.get(url)).content == result_of(str(job.result_lease))


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """A connection to the service's database, which keeps a journal."""
    url = database_url.replace("+psycopg", "")
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        await connection.execute(JOURNAL)
        yield connection


@pytest.mark.parametrize("seed", range(6))
async def test_no_job_is_lost_and_none_is_done_twice(
    replica: Replica, world: World, database: psycopg.AsyncConnection[Any], seed: int
) -> None:
    draw = random.Random(seed)
    weights = [weight * draw.random() for weight in ACTIONS.values()]
    endpoint_ids = [world.endpoints[0].id, world.add_endpoint(), world.add_endpoint(REAL_TIME)]
    async with AsyncExitStack() as stack, together() as tasks:
        workers = [AnyWorker("w", endpoint_id, tasks) for endpoint_id in endpoint_ids]
        workers.append(AnyWorker("v", endpoint_ids[0], tasks))
        play = Play(replica, database, tasks, workers, stack)
        await play.open()
        await play.open()
        for _ in range(NUM_ROUNDS):
            names = draw.choices(list(ACTIONS), weights, k=draw.randint(1, MAX_AT_ONCE))
            await asyncio.gather(*(getattr(play, name)(draw.randrange(99), draw.randrange(99)) for name in names))
        await play.come_to_rest()
        await check(play)
