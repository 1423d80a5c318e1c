"""Owns a running training service for tests: real PostgreSQL and object store, small real servers for its peers, and a
trainer that does what the test says."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import grpc
import httpx
import pytest
from sqlalchemy import text

from esd.endpoints.v1 import endpoints_pb2, endpoints_pb2_grpc
from esd.models.v1 import models_pb2, models_pb2_grpc
from esd.training.v1 import training_pb2 as pb
from esd.training.v1 import training_pb2_grpc
from services.common.blobs import Blobs
from services.common.database import Database
from services.common.leftovers import LeftoverStore
from services.common.notifications import Notifications
from services.training.channels import CHANNELS
from services.training.domain import Trainings
from services.training.peers import Models, Tasks
from services.training.reconcile import ControlLoop
from services.training.servicer import TrainingServicer
from services.training.store import TrainingStore
from services.training.trainer_servicer import TrainerServicer
from services.training.trainer_store import TrainerStore
from services.training.trainers import Trainers
from services.training.watching import Watching
from tests.serving import Metadata, Tokens

MODEL = "v1-5.safetensors"
CHECKPOINT = "3a6c4a3e-1111-4b8e-9f0a-0a1b2c3d4e5f"


@dataclass
class World(models_pb2_grpc.ModelsServiceServicer, endpoints_pb2_grpc.TaskServiceServicer):
    """What the other services know: one checkpoint and two datasets of the role Designer, a dataset of nobody's, tasks
    and what was asked."""

    bucket: str
    size_bytes: int = 17  # of the checkpoint
    sha256: str = "ab" * 32
    task: endpoints_pb2.Task = field(default_factory=lambda: endpoints_pb2.Task(state=endpoints_pb2.TASK_STATE_RUNNING))
    is_away: bool = False  # the endpoints service
    is_stuck: bool = False  # the models service, after it has opened a checkpoint
    stuck: asyncio.Event = field(default_factory=asyncio.Event)
    started: list[Any] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)  # of open checkpoints, by training
    finished: dict[str, Any] = field(default_factory=dict)
    deleted: list[str] = field(default_factory=list)
    refusal: str = ""

    async def ResolveCheckpoints(self, request: Any, context: Any) -> Any:
        [name] = request.names
        if (name.type, name.name) != ("Stable-diffusion", MODEL) or not _may_see(request):
            return models_pb2.ResolveCheckpointsResponse(missing=[name])
        folder = f"Stable-diffusion/checkpoint/custom/{CHECKPOINT}"
        found = models_pb2.ResolvedCheckpoint(
            id=CHECKPOINT,
            type=name.type,
            name=name.name,
            s3_location=f"s3://{self.bucket}/{folder}",
            key=f"{folder}/{MODEL}",
            size_bytes=self.size_bytes,
            sha256=self.sha256,
        )
        return models_pb2.ResolveCheckpointsResponse(checkpoints=[found])

    async def ResolveDataset(self, request: Any, context: Any) -> Any:
        is_there = request.dataset_name in {"lego", "others"} and _may_see(request)
        if not is_there and not (request.dataset_name == "nobodys" and request.sees_everything):
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such dataset")
        return models_pb2.ResolveDatasetResponse(prefix=f"dataset/{request.dataset_name}/")

    async def CreateTrainedCheckpoint(self, request: Any, context: Any) -> Any:
        if self.is_stuck:
            self.names[request.checkpoint_id] = request.name
            self.stuck.set()
            await asyncio.Event().wait()
        if request.name in self.names.values():
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{request.name} already exists")
        self.names[request.checkpoint_id] = request.name
        return models_pb2.CreateTrainedCheckpointResponse()

    async def FinishTrainedCheckpoint(self, request: Any, context: Any) -> Any:
        self.finished[request.checkpoint_id] = request
        if not request.files:
            self.names.pop(request.checkpoint_id, None)
        names = [] if self.refusal else [file.name for file in request.files]
        reason = self.refusal or ("" if names else request.reason)
        return models_pb2.FinishTrainedCheckpointResponse(names=names, reason=reason)

    async def DeleteTrainedCheckpoint(self, request: Any, context: Any) -> Any:
        finished = self.finished.get(request.checkpoint_id)
        was_kept = bool(finished and finished.files)
        if not was_kept:
            self.deleted.append(request.checkpoint_id)
            self.names.pop(request.checkpoint_id, None)
        return models_pb2.DeleteTrainedCheckpointResponse(was_kept=was_kept)

    async def StartTask(self, request: Any, context: Any) -> Any:
        await self._unless_away(context)
        self.started.append(request)
        return endpoints_pb2.StartTaskResponse(task=self.task)

    async def GetTask(self, request: Any, context: Any) -> Any:
        await self._unless_away(context)
        if not any(started.task_id == request.task_id for started in self.started):
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such task")
        return endpoints_pb2.GetTaskResponse(task=self.task)

    async def StopTask(self, request: Any, context: Any) -> Any:
        await self._unless_away(context)
        self.stopped.append(request.task_id)
        return endpoints_pb2.StopTaskResponse()

    async def _unless_away(self, context: Any) -> None:
        if self.is_away:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not now")


def _may_see(request: Any) -> bool:
    return "Designer" in request.roles or bool(request.sees_everything)


async def next_of(call: Any) -> Any:
    """The next message of a stream; None at its end, however that came."""
    try:
        message = await asyncio.wait_for(call.read(), 120)
    except grpc.aio.AioRpcError:
        return None
    return None if message is grpc.aio.EOF else message


class ScriptedTrainer:
    """A trainer's end of the Train stream."""

    def __init__(self, call: Any, http: httpx.AsyncClient) -> None:
        self._call = call
        self._http = http
        self._sequence = 0
        self._request = 0
        self.welcome: pb.TrainerWelcome = pb.TrainerWelcome()

    async def hello(self, session: str) -> None:
        await self._call.write(pb.TrainRequest(hello=pb.TrainerHello(session=session, device="cpu")))
        self.welcome = (await self.read()).welcome
        self._sequence = self.welcome.num_kept

    async def read(self) -> Any:
        """The next message; fails when the stream ended."""
        message = await next_of(self._call)
        assert message is not None, await self._call.details()
        return message

    async def until(self, kind: str) -> Any:
        """The next message of a kind."""
        while (message := await self.read()).WhichOneof("message") != kind:
            pass
        return getattr(message, kind)

    async def urls(self, kind: Any, *names: str) -> list[str]:
        self._request += 1
        await self._call.write(pb.TrainRequest(want=pb.UrlsWanted(request_id=self._request, kind=kind, names=names)))
        answer = await self.until("urls")
        assert answer.request_id == self._request
        return list(answer.urls)

    async def send(self, sequence: int, **event: Any) -> None:
        """Sends an event without waiting."""
        await self._call.write(pb.TrainRequest(event=pb.TrainerEvent(sequence=sequence, **event)))

    async def tell(self, **event: Any) -> None:
        """Tells an event, and waits until it is kept."""
        self._sequence += 1
        await self.send(self._sequence, **event)
        assert (await self.until("kept")).sequence == self._sequence

    async def upload(self, name: str, content: bytes) -> pb.UploadedFile:
        [url] = await self.urls(pb.URL_KIND_UPLOAD, name)
        (await self._http.put(url, content=content)).raise_for_status()
        return pb.UploadedFile(name=name, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    async def save(self, name: str, content: bytes, epoch: int) -> None:
        """Uploads a network and tells of it."""
        await self.tell(saved=pb.SavedNetwork(file=await self.upload(name, content), epoch=epoch))

    async def end(self) -> grpc.StatusCode:
        """How the service ends the stream."""
        while await next_of(self._call) is not None:
            pass
        code: grpc.StatusCode = await self._call.code()
        return code


@dataclass
class Service:
    """The running service as users and trainers see it."""

    channel: grpc.aio.Channel
    stub: Any
    trainers: Any
    world: World
    blobs: Blobs
    http: httpx.AsyncClient
    tokens: Tokens
    notifications: Notifications
    database: Database

    def user(self, name: str = "ann", *more: str, **options: Any) -> Metadata:
        """A user who may train."""
        return self.tokens.user(name, ["train:all", *more], ["Designer"], **options)

    def document(self, **keys: Any) -> dict[str, Any]:
        """The params of the document's shape."""
        return {
            "training_params": {
                "training_instance_type": "ml.g5.2xlarge",
                "s3_model_path": f"s3://{self.blobs.bucket}/Stable-diffusion/checkpoint/custom/{CHECKPOINT}/{MODEL}",
                "s3_data_path": f"s3://{self.blobs.bucket}/dataset/lego",
                "fm_type": "sd_1_5",
            },
            "config_params": {"training": {"output_name": f"demo-{uuid4().hex[:8]}", "max_train_epochs": 3} | keys},
        }

    async def create(
        self, params: dict[str, Any] | None = None, metadata: Metadata | None = None, **fields: Any
    ) -> Any:
        """A training."""
        request = pb.CreateTrainingJobRequest(**({"lora_train_type": "kohya"} | fields))
        request.params.SetInParent()
        request.params.update(self.document() if params is None else params)
        return await self.stub.CreateTrainingJob(request, metadata=metadata or self.user())

    async def refused(self, *arguments: Any, **options: Any) -> tuple[grpc.StatusCode, str]:
        """How a creation is refused."""
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await self.create(*arguments, **options)
        return refusal.value.code(), refusal.value.details() or ""

    async def get(self, job_id: str, metadata: Metadata | None = None) -> Any:
        request = pb.GetTrainingJobRequest(job_id=job_id)
        return await self.stub.GetTrainingJob(request, metadata=metadata or self.user())

    async def until(self, job_id: str, *statuses: str) -> Any:
        """The training once it has one of these statuses: by the service's own notification, not by polling."""
        async with asyncio.timeout(120):
            with self.notifications.subscribed(("training_moved", job_id)) as moved:
                while (job := await self.get(job_id)).job_status not in statuses:
                    await moved.wait()
                    moved.clear()
        return job

    async def until_gone(self, job_id: str) -> None:
        """Waits until nothing is left of a training that has not begun, which is as if it was asked for long ago."""
        with self.notifications.subscribed(("training_moved", job_id)) as moved:
            async with self.database.transaction() as session:
                await session.execute(text("UPDATE training SET create_time = create_time - interval '1 hour'"))
                await session.execute(text("SELECT pg_notify('trainings_due', '')"))
            async with asyncio.timeout(120):
                while await self._is_there(job_id):
                    await moved.wait()  # also woken by what is no deletion, such as the listener's first connection
                    moved.clear()

    async def _is_there(self, job_id: str) -> bool:
        """Whether the training has a row, which nobody may see."""
        async with self.database.transaction() as session:
            found = await session.scalar(text("SELECT count(*) FROM training WHERE id = :id"), {"id": job_id})
        return bool(found)

    @asynccontextmanager
    async def trainer(self, job_id: str, session: str = "") -> AsyncIterator[ScriptedTrainer]:
        """A trainer with an open stream, welcomed."""
        call = self.trainers.Train(metadata=self.tokens.trainer(job_id))
        trainer = ScriptedTrainer(call, self.http)
        await trainer.hello(session or str(uuid4()))
        try:
            yield trainer
        finally:
            call.cancel()

    async def keys(self, prefix: str) -> list[str]:
        """The names of the objects below a prefix."""
        return sorted(blob.key.removeprefix(prefix) for blob in await self.blobs.find(prefix))


@pytest.fixture
def database_url(lend_database: Callable[[str], str]) -> str:
    """The URL of a database with the service's tables."""
    return lend_database("training")


@pytest.fixture
def stopping() -> asyncio.Event:
    """Set by a test that stops the service."""
    return asyncio.Event()


@pytest.fixture
async def service(
    database_url: str,
    blobs: Blobs,
    http: httpx.AsyncClient,
    tokens: Tokens,
    stopping: asyncio.Event,
    serve: Callable[..., Awaitable[grpc.aio.Channel]],
) -> AsyncIterator[Service]:
    """The running service; its datasets and its model are in the store."""
    database = Database(database_url)
    # SQLAlchemy loses its first connection, open, when the task that makes it is cancelled.
    async with database.transaction():
        pass
    world = World(blobs.bucket)
    for key in ("dataset/lego/10_lego/a.png", "dataset/lego/10_lego/a.txt", "dataset/others/1_brick/b.png"):
        await blobs.put(key, key.encode())
    await blobs.put(f"Stable-diffusion/checkpoint/custom/{CHECKPOINT}/{MODEL}", b"seventeen bytes !")
    async with AsyncExitStack() as stack:
        server = grpc.aio.server()
        models_pb2_grpc.add_ModelsServiceServicer_to_server(world, server)
        endpoints_pb2_grpc.add_TaskServiceServicer_to_server(world, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        stack.push_async_callback(server.stop, None)
        known = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
        models, tasks, notifications = Models(known), Tasks(known), Notifications()
        store, trainer_store = TrainingStore(database), TrainerStore(database)
        control = ControlLoop(store, trainer_store, LeftoverStore(database), blobs, models, tasks, notifications)
        trainings = Trainings(store, blobs, models, control, max_seconds=7200, max_per_user=3)

        def add_servicers(server: grpc.aio.Server) -> None:
            watching = Watching(trainings, store, notifications, stopping)
            training_pb2_grpc.add_TrainingServiceServicer_to_server(TrainingServicer(trainings, watching), server)
            servicer = TrainerServicer(Trainers(trainer_store, blobs), store, notifications, stopping)
            training_pb2_grpc.add_TrainerServiceServicer_to_server(servicer, server)

        channel = await serve(add_servicers, audience="training")
        chores = [
            asyncio.create_task(database.listen(CHANNELS, notifications.on_notify)),
            asyncio.create_task(notifications.wake_all(at=stopping)),
            asyncio.create_task(control.run()),
        ]
        yield Service(
            channel,
            training_pb2_grpc.TrainingServiceStub(channel),
            training_pb2_grpc.TrainerServiceStub(channel),
            world,
            blobs,
            http,
            tokens,
            notifications,
            database,
        )
        stopping.set()
        for chore in chores:
            chore.cancel()
        await asyncio.gather(*chores, return_exceptions=True)
    await database.dispose()
