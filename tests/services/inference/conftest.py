"""Owns a running inference service for tests: real PostgreSQL and object store, small real servers for its peers, and a
worker that does what the test says."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Any
from uuid import uuid4

import grpc
import httpx
import pytest

from esd.endpoints.v1 import endpoints_pb2, endpoints_pb2_grpc
from esd.identity.v1 import identity_pb2, identity_pb2_grpc
from esd.inference.v1 import inference_pb2 as pb
from esd.inference.v1 import inference_pb2_grpc
from esd.models.v1 import models_pb2, models_pb2_grpc
from esd.worker.v1 import worker_pb2
from services.common.blobs import Blobs
from services.common.database import Database
from services.common.leftovers import LeftoverStore
from services.common.notifications import Notifications
from services.common.outbound import Outbound
from services.common.tasks import Background
from services.inference.channels import CHANNELS
from services.inference.domain import Inference
from services.inference.peers import Peers
from services.inference.queue.domain import Limits, Queue
from services.inference.queue.pins import Pins
from services.inference.queue.pool_store import PoolStore
from services.inference.queue.retired import RetiredEndpoints
from services.inference.queue.servicer import QueueServicer
from services.inference.queue.store import LeaseStore
from services.inference.servicer import InferenceServicer
from services.inference.store import JobStore
from services.inference.submitting.priorities import DEFAULT_RANGES, Priorities
from services.inference.submitting.quotas import Quotas
from services.inference.upkeep.cleaning import Cleaner
from services.inference.upkeep.deadlines import Deadlines
from services.inference.upkeep.outputs import Outputs
from services.inference.views import Views
from services.inference.watching.events import Events
from services.inference.watching.hub import Hub
from services.inference.watching.store import WatchStore
from services.inference.webhooks.domain import Webhooks
from services.inference.webhooks.store import WebhookStore
from tests.serving import Metadata, Tokens, serving

# What they assert is told as what a test asserts.
pytest.register_assert_rewrite("tests.services.inference.any_worker", "tests.services.inference.journal")

PNG = b"\x89PNG\r\n\x1a\n not really"
# A payload that is kept as it came in its job's row, and one that has no place there.
LONG = {"enable_hr": True, "denoising_strength": 0.5} | dict.fromkeys(("prompt", "hr_prompt"), "long " * 2_000)
LARGE = LONG | dict.fromkeys(("negative_prompt", "hr_negative_prompt"), "long " * 2_000)
SHA256 = hashlib.sha256(PNG).hexdigest()


@dataclass
class World(
    endpoints_pb2_grpc.EndpointsServiceServicer,
    models_pb2_grpc.ModelsServiceServicer,
    identity_pb2_grpc.IdentityServiceServicer,
):
    """What the other services know: endpoints, one checkpoint under many names and the users ann and bob."""

    endpoints: list[endpoints_pb2.Endpoint] = field(default_factory=list)
    checkpoint_id: str = field(default_factory=lambda: str(uuid4()))
    refusal: grpc.StatusCode | None = None  # what FindEndpoints answers instead
    num_searches: int = 0  # of endpoints, so far

    def add_endpoint(self, inference_type: str = "Async", status: str = "InService") -> str:
        endpoint_id = str(uuid4())
        name = f"esd-{inference_type.lower()}-{endpoint_id[:7]}"
        self.endpoints.append(
            endpoints_pb2.Endpoint(
                id=endpoint_id,
                endpoint_name=name,
                endpoint_type=inference_type,
                endpoint_status=status,
                instance_type="one-machine",
            )
        )
        return endpoint_id

    async def FindEndpoints(self, request: Any, context: Any) -> endpoints_pb2.FindEndpointsResponse:
        self.num_searches += 1
        if self.refusal is not None:
            await context.abort(self.refusal, "not now")
        if request.endpoint_name:
            found = [endpoint for endpoint in self.endpoints if endpoint.endpoint_name == request.endpoint_name]
        else:
            found = [
                endpoint
                for endpoint in self.endpoints
                if endpoint.endpoint_type == request.inference_type and endpoint.endpoint_status == "InService"
            ]
        return endpoints_pb2.FindEndpointsResponse(endpoints=found)

    async def ResolveCheckpoints(self, request: Any, context: Any) -> models_pb2.ResolveCheckpointsResponse:
        response = models_pb2.ResolveCheckpointsResponse()
        for name in request.names:
            if name.type == "Stable-diffusion" and name.name.endswith("v1-5.safetensors"):
                response.checkpoints.add(
                    id=self.checkpoint_id,
                    type=name.type,
                    name=name.name,
                    all_names=["v1-5.safetensors", "v1-5.yaml"],
                    s3_location="s3://b/Stable-diffusion/checkpoint/custom/x",
                    key="Stable-diffusion/checkpoint/custom/x/v1-5.safetensors",
                    size_bytes=17,
                    sha256="ab" * 32,
                )
            else:
                response.missing.append(name)
        return response

    async def GetUser(self, request: Any, context: Any) -> identity_pb2.GetUserResponse:
        if request.username not in {"ann", "bob"}:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such user")
        return identity_pb2.GetUserResponse(username=request.username, roles=["Designer"])


@dataclass
class Service:
    """The running service as users and workers see it."""

    jobs: Any
    queue: Any
    world: World
    blobs: Blobs
    http: httpx.AsyncClient
    tokens: Tokens
    endpoint_id: str
    notifications: Notifications
    retired: RetiredEndpoints

    def user(self, name: str = "ann", *more: str, **options: Any) -> Metadata:
        """A user who may create jobs."""
        return self.tokens.user(name, ["inference:all", *more], ["Designer"], **options)

    async def create(self, inference_type: str = "Async", **fields: Any) -> Any:
        """A job that waits for its payload."""
        given = {"task_type": "txt2img", "models": {"Stable-diffusion": ["v1-5.safetensors"]}} | fields
        request = pb.CreateInferenceJobRequest(inference_type=inference_type, **given)
        return (await self.jobs.CreateInferenceJob(request, metadata=self.user())).inference

    async def upload(self, receipt: Any, payload: bytes | None = None, **fields: Any) -> None:
        """PUTs the payload as a client does: with no particular headers."""
        content = json.dumps({"prompt": "a cat", "steps": 2, **fields}).encode() if payload is None else payload
        (await self.http.put(receipt.api_params_s3_upload_url, content=content)).raise_for_status()

    async def start(self, job_id: str, metadata: Metadata | None = None) -> Any:
        return await self.jobs.StartInferenceJob(
            pb.StartInferenceJobRequest(job_id=job_id), metadata=metadata or self.user()
        )

    async def started(self, **fields: Any) -> str:
        """The id of an Async job in the queue."""
        receipt = await self.create()
        await self.upload(receipt, **fields)
        await self.start(receipt.id)
        return str(receipt.id)

    async def get(self, job_id: str, metadata: Metadata | None = None) -> Any:
        request = pb.GetInferenceJobRequest(job_id=job_id)
        return (await self.jobs.GetInferenceJob(request, metadata=metadata or self.user())).data

    async def ended(self, job_id: str) -> Any:
        """The job once it has ended: by the service's own notification, not by polling."""
        with self.notifications.subscribed(("job_ended", job_id)) as event:
            while (job := await self.get(job_id)).status not in {"succeed", "failed"}:
                await event.wait()
                event.clear()
        return job

    @asynccontextmanager
    async def worker(
        self, worker_id: str = "w", held: list[str] | None = None, endpoint_id: str = ""
    ) -> AsyncIterator["ScriptedWorker"]:
        """A worker with an open stream, welcomed."""
        call = self.queue.Work(metadata=self.tokens.worker(endpoint_id or self.endpoint_id))
        await call.write(pb.WorkRequest(hello=pb.Hello(worker_id=worker_id, held_leases=held or [], device="cpu")))
        worker = ScriptedWorker(call, self.http)
        worker.kept = list((await worker.read()).welcome.kept_leases)
        try:
            yield worker
        finally:
            call.cancel()


Replica = Callable[[asyncio.Event], AbstractAsyncContextManager[Service]]


class ScriptedWorker:
    """A worker's end of the Work stream."""

    def __init__(self, call: Any, http: httpx.AsyncClient) -> None:
        self._call = call
        self._http = http
        self.kept: list[str] = []

    async def read(self) -> Any:
        """The next message; fails when the stream ended."""
        message = await self._call.read()
        if message is grpc.aio.EOF:
            raise AssertionError(f"the stream ended: {await self._call.code()} {await self._call.details()}")
        return message

    async def code(self) -> grpc.StatusCode:
        """How the stream ended."""
        return await ended_with(self._call)

    async def want(self, num_jobs: int = 1, warm: list[str] | None = None) -> None:
        await self._call.write(pb.WorkRequest(want=pb.Want(num_jobs=num_jobs, warm_models=warm or [])))

    async def take(self) -> Any:
        """Asks for a job and waits for it."""
        await self.want()
        message = await self.read()
        assert message.WhichOneof("message") == "assign"
        return message.assign

    async def tell(self, lease_id: str, **event: Any) -> None:
        await self._call.write(
            pb.WorkRequest(event=pb.LeasedEvent(lease_id=lease_id, event=worker_pb2.JobEvent(**event)))
        )

    async def begin(self, assign: Any) -> None:
        await self.tell(assign.lease_id, started=worker_pb2.JobStarted())

    async def finish(
        self, assign: Any, *, upload: bool = True, content: bytes = PNG, size: int = len(PNG), sha256: str = SHA256
    ) -> Any:
        """Uploads the results, says done and answers what the service says to that."""
        spec = assign.spec
        if upload:
            for place in [*spec.image_uploads, spec.param_upload]:
                (await self._http.put(place.url, content=content)).raise_for_status()
        done = worker_pb2.JobDone(
            images=[{"name": place.name, "size_bytes": size, "sha256": sha256} for place in spec.image_uploads],
            param={"name": spec.param_upload.name, "size_bytes": size, "sha256": sha256},
            timings=worker_pb2.Timings(
                fetch_seconds=0.1, load_seconds=0.4, pipeline_seconds=0.2, encode_seconds=0.5, upload_seconds=0.3
            ),
        )
        await self.tell(assign.lease_id, done=done)
        return await self.read()

    async def leave(self) -> None:
        """Breaks the stream."""
        self._call.cancel()


async def ended_with(call: Any) -> grpc.StatusCode:
    """The status of a stream, after whatever it still had to say."""
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@asynccontextmanager
async def peer(add: Callable[[grpc.aio.Server], None]) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a real server on a port of its own."""
    server = grpc.aio.server()
    add(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(0)


@pytest.fixture
def database_url(lend_database: Callable[[str], str]) -> str:
    """The URL of a database with the service's tables."""
    return lend_database("inference")


@pytest.fixture
def limits() -> Limits:
    """How patient the service is; a test module may have its own."""
    return Limits(lease_seconds=30.0, renew_seconds=0.5, grace_seconds=0.1, sweep_seconds=60.0, retry_seconds=0.1)


@pytest.fixture
def quotas() -> Quotas:
    """What each user may have; a test module may have its own."""
    return Quotas()


@pytest.fixture
def webhook_seconds() -> float:
    """How long a webhook is tried; a test module may have its own."""
    return 60.0


@pytest.fixture
def stopping() -> asyncio.Event:
    """Set by a test that stops the service."""
    return asyncio.Event()


@pytest.fixture
def world() -> World:
    """What the other services know: one Async endpoint, to begin with."""
    world = World()
    world.add_endpoint()
    return world


@pytest.fixture
async def known(world: World) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to them."""

    def add_peers(server: grpc.aio.Server) -> None:
        endpoints_pb2_grpc.add_EndpointsServiceServicer_to_server(world, server)
        models_pb2_grpc.add_ModelsServiceServicer_to_server(world, server)
        identity_pb2_grpc.add_IdentityServiceServicer_to_server(world, server)

    async with peer(add_peers) as channel:
        yield channel


@pytest.fixture
def replica(
    database_url: str,
    blobs: Blobs,
    http: httpx.AsyncClient,
    tokens: Tokens,
    limits: Limits,
    quotas: Quotas,
    webhook_seconds: float,
    world: World,
    known: grpc.aio.Channel,
) -> Replica:
    """Runs a replica of the service during a block; `stopping` ends the streams in it. No sweep helps it: what works,
    works by notification."""

    @asynccontextmanager
    async def running(stopping: asyncio.Event) -> AsyncIterator[Service]:
        database = Database(database_url)
        # SQLAlchemy loses its first connection, open, when the task that makes it is cancelled.
        async with database.transaction():
            pass
        peers, notifications, background = Peers(known, known, known), Notifications(), Background()
        pools, leftovers = PoolStore(database), LeftoverStore(database)
        store, retired = JobStore(database, quotas), RetiredEndpoints(pools, peers)
        outputs = Outputs(store, blobs)
        cleaner = Cleaner(leftovers, store, blobs, limits.renew_seconds)
        queue = Queue(LeaseStore(database), blobs, leftovers, outputs, background, limits)
        hub, views = Hub(WatchStore(database), notifications), Views(blobs)
        here = Outbound([ip_network("127.0.0.0/8")])
        webhooks = Webhooks(
            WebhookStore(database), here, notifications, first_wait_seconds=0.01, try_seconds=webhook_seconds
        )

        def add_servicers(server: grpc.aio.Server) -> None:
            jobs = Inference(store, blobs, peers, notifications, cleaner, Priorities(DEFAULT_RANGES), stopping)
            servicer = InferenceServicer(jobs, views, Events(jobs, views, hub), webhooks)
            inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
            workers = QueueServicer(queue, pools, retired, Pins(pools, peers, blobs), notifications, hub, stopping)
            inference_pb2_grpc.add_QueueServiceServicer_to_server(workers, server)

        chores = (
            database.listen(CHANNELS, notifications.on_notify),
            queue.run(),
            retired.run(limits.renew_seconds),
            cleaner.run(),
            Deadlines(store, notifications).run(),
            hub.run(stopping),
            webhooks.run(),
            notifications.wake_all(at=stopping),
        )
        running = asyncio.gather(*chores)
        try:
            async with serving(add_servicers, tokens.verifier("inference")) as channel:
                yield Service(
                    inference_pb2_grpc.InferenceServiceStub(channel),
                    inference_pb2_grpc.QueueServiceStub(channel),
                    world,
                    blobs,
                    http,
                    tokens,
                    world.endpoints[0].id,
                    notifications,
                    retired,
                )
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await background.stop()
            await database.dispose()

    return running


@pytest.fixture
async def service(replica: Replica, stopping: asyncio.Event) -> AsyncIterator[Service]:
    """The running service with one Async endpoint."""
    async with replica(stopping) as service:
        yield service
        stopping.set()
