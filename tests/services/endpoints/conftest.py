"""Owns what the endpoints tests share: the service's parts on a real database, and small real servers as its peers.

peers      stand-ins of identity and of the queue on one real server; what they were told is theirs to read
store      the store on a fresh, migrated database
foreman    whom stand-in tasks ask what to do
stub       EndpointsService on a real server, without a control loop
start_service  starts the service as a process
run_loop   starts a control loop with the local cluster; several may run, each can be stopped
"""

import asyncio
import os
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from esd.endpoints.v1 import endpoints_pb2_grpc
from esd.identity.v1 import identity_pb2 as identity
from esd.identity.v1 import identity_pb2_grpc
from esd.inference.v1 import inference_pb2 as inference
from esd.inference.v1 import inference_pb2_grpc
from esd.models.v1 import models_pb2 as models
from esd.models.v1 import models_pb2_grpc
from esd.options.v1 import options_pb2 as options
from services.common.audit import Audit
from services.common.auth import AUDIENCE_SERVICES, Caller, Kind, current_caller
from services.common.clients import TokenSource, channel
from services.common.database import Database
from services.common.errors import NotFound, Unauthenticated
from services.common.server import Server
from services.endpoints.cluster import Cluster, kubernetes
from services.endpoints.cluster.kubernetes_api import KubernetesSettings
from services.endpoints.cluster.local import LocalCluster
from services.endpoints.cluster.machine import LocalSettings
from services.endpoints.cluster.process import start_time_of
from services.endpoints.cluster.profiles import Profile
from services.endpoints.domain import Endpoints
from services.endpoints.event_store import EventStore
from services.endpoints.peers import Identity, Models, Queue
from services.endpoints.reconcile import ControlLoop
from services.endpoints.scaling import ScalingPolicy
from services.endpoints.servicer import EndpointsServicer
from services.endpoints.store import EndpointStore
from services.endpoints.task_control import TaskControl
from services.endpoints.task_store import TaskStore
from tests.deploy.control_plane import ASSETS, ControlPlane, account_token, control_plane, prepare
from tests.deploy.process_kubelet import ProcessKubelet
from tests.processes import ROOT
from tests.services.endpoints.foreman import Foreman
from tests.serving import AUDIT_KEY, Metadata, Tokens

OWN_SECRET = "the secret of the endpoints service"
STANDIN_WORKER = [sys.executable, "-m", "tests.services.endpoints.standin_worker"]
USERS = {"ann": ["painter"], "bob": ["sculptor"]}


class StandInIdentity(identity_pb2_grpc.IdentityServiceServicer):
    """Knows two users, and gives tokens for the secrets it made."""

    def __init__(self, tokens: Tokens) -> None:
        self._signer = tokens.signer
        self.secrets: dict[str, str] = {}  # of workers, by endpoint
        self.trainers: dict[str, str] = {}  # the secrets of tasks

    async def GetUser(self, request: identity.GetUserRequest, context: Any) -> identity.GetUserResponse:
        if request.username not in USERS:
            raise NotFound("no such user")
        return identity.GetUserResponse(username=request.username, roles=USERS[request.username])

    async def CreateSecret(self, request: identity.CreateSecretRequest, context: Any) -> identity.CreateSecretResponse:
        secrets = self._secrets(request.caller)
        secrets[request.subject] = f"secret of {request.subject}"
        return identity.CreateSecretResponse(secret=secrets[request.subject])

    async def DeleteSecret(self, request: identity.DeleteSecretRequest, context: Any) -> identity.DeleteSecretResponse:
        self._secrets(request.caller).pop(request.subject, None)
        return identity.DeleteSecretResponse()

    def _secrets(self, caller: options.Caller) -> dict[str, str]:
        return {options.CALLER_WORKER: self.secrets, options.CALLER_TRAINER: self.trainers}[caller]

    async def IssueToken(self, request: identity.IssueTokenRequest, context: Any) -> identity.IssueTokenResponse:
        if request.secret == OWN_SECRET:
            token = self._signer.sign(Caller(Kind.SERVICE, "endpoints"), AUDIENCE_SERVICES, 300)
        elif request.secret in self.secrets.values():
            token = self._signer.sign(Caller(Kind.WORKER, request.secret.split()[-1]), "inference", 300)
        else:
            raise Unauthenticated("the secret is not known")
        return identity.IssueTokenResponse(token=token, lifetime_seconds=300)


class StandInModels(models_pb2_grpc.ModelsServiceServicer):
    """Knows two checkpoints, one of them for painters only."""

    async def ResolveCheckpoints(self, request: models.ResolveCheckpointsRequest, context: Any) -> Any:
        known = {"for-all.safetensors"} | ({"for-painters.ckpt"} if "painter" in request.roles else set())
        missing = [name for name in request.names if name.name not in known or name.type != "Stable-diffusion"]
        return models.ResolveCheckpointsResponse(missing=missing)


class StandInQueue(inference_pb2_grpc.QueueServiceServicer):
    """Sees workers come and go. `jobs` is what is known of them by endpoint; a retired endpoint's are gone at once."""

    def __init__(self) -> None:
        self.workers: dict[str, set[str]] = {}
        self.jobs: dict[str, dict[str, Any]] = {}
        self.retired: list[tuple[str, str]] = []
        self.pinned: dict[str, list[str]] = {}
        self.changed = asyncio.Condition()
        self.num_changes = 0

    async def set_jobs(self, endpoint_id: str, **known: Any) -> None:
        """What the queue knows of an endpoint's jobs from now on: fields of Pool."""
        self.jobs[endpoint_id] = known
        await self._tell()

    async def _tell(self) -> None:
        async with self.changed:
            self.num_changes += 1
            self.changed.notify_all()

    async def Work(self, requests: AsyncIterator[inference.WorkRequest], context: Any) -> AsyncIterator[Any]:
        endpoint_id = current_caller().name
        hello = (await anext(requests)).hello
        pool = self.workers.setdefault(endpoint_id, set())
        pool.add(hello.worker_id)
        await self._tell()
        try:
            async for _ in requests:
                yield inference.WorkResponse()
        finally:
            pool.discard(hello.worker_id)
            await self._tell()

    async def WatchPools(self, request: inference.WatchPoolsRequest, context: Any) -> AsyncIterator[Any]:
        while True:
            async with self.changed:
                told = self.num_changes
                pools = [
                    inference.Pool(
                        endpoint_id=endpoint_id,
                        worker_ids=self.workers.get(endpoint_id, ()),
                        **self.jobs.get(endpoint_id, {}),
                    )
                    for endpoint_id in self.workers.keys() | self.jobs.keys()
                ]
            yield inference.WatchPoolsResponse(pools=pools)
            async with self.changed:
                await self.changed.wait_for(lambda told=told: self.num_changes != told)

    async def PinModels(self, request: inference.PinModelsRequest, context: Any) -> Any:
        self.pinned[request.endpoint_id] = list(request.names)
        return inference.PinModelsResponse()

    async def RetireEndpoint(self, request: inference.RetireEndpointRequest, context: Any) -> Any:
        self.retired.append((request.endpoint_id, request.reason))
        self.jobs.pop(request.endpoint_id, None)
        await self._tell()
        return inference.RetireEndpointResponse()


@dataclass
class Peers:
    """The stand-ins and where they are."""

    address: str
    identity: StandInIdentity
    queue: StandInQueue


@pytest.fixture
def database_url(lend_database: Callable[[str], str]) -> str:
    """The URL of a database with the service's tables."""
    return lend_database("endpoints")


@pytest.fixture
async def peers(tokens: Tokens) -> AsyncIterator[Peers]:
    server = Server("127.0.0.1:0", tokens.verifier("inference"))
    stand_ins = StandInIdentity(tokens), StandInQueue()
    identity_pb2_grpc.add_IdentityServiceServicer_to_server(stand_ins[0], server.grpc)
    inference_pb2_grpc.add_QueueServiceServicer_to_server(stand_ins[1], server.grpc)
    models_pb2_grpc.add_ModelsServiceServicer_to_server(StandInModels(), server.grpc)
    port = await server.start()
    yield Peers(f"127.0.0.1:{port}", *stand_ins)
    await server.stop(grace_seconds=0)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = Database(database_url)
    yield database
    await database.dispose()


@pytest.fixture
def store(database: Database) -> EndpointStore:
    return EndpointStore(database, Audit("endpoints", AUDIT_KEY))


@pytest.fixture
def task_store(database: Database) -> TaskStore:
    return TaskStore(database)


@pytest.fixture
async def clients(peers: Peers) -> tuple[Identity, Queue]:
    own = channel(peers.address, TokenSource(peers.address, OWN_SECRET))
    return Identity(own), Queue(own)


@pytest.fixture
async def domain(store: EndpointStore, database: Database, clients: tuple[Identity, Queue], peers: Peers) -> Endpoints:
    models = Models(channel(peers.address, TokenSource(peers.address, OWN_SECRET)))
    return Endpoints(store, EventStore(database), clients[0], models, max_workers=8)


@pytest.fixture
async def stub(domain: Endpoints, serve: Callable[..., Awaitable[Any]]) -> endpoints_pb2_grpc.EndpointsServiceStub:
    servicer = EndpointsServicer(domain)
    return endpoints_pb2_grpc.EndpointsServiceStub(
        await serve(lambda server: endpoints_pb2_grpc.add_EndpointsServiceServicer_to_server(servicer, server))
    )


@pytest.fixture
async def foreman(tmp_path: Path) -> AsyncIterator[Foreman]:
    async with Foreman(tmp_path / "foreman") as foreman:
        yield foreman


@pytest.fixture
def admin(tokens: Tokens) -> Metadata:
    return tokens.user("ann", ["sagemaker_endpoint:all"], ["painter"])


@pytest.fixture
def service_environment(database_url: str, peers: Peers, tokens: Tokens, tmp_path: Path) -> dict[str, str]:
    """What a service as a process needs to run stand-in workers."""
    (tmp_path / "secret").write_text(OWN_SECRET)
    (tmp_path / "verifying.pem").write_text(tokens.public_key_pem)
    (tmp_path / "audit").write_text(AUDIT_KEY)
    return os.environ | {
        "ESD_DATABASE_URL": database_url,
        "ESD_SECRET_FILE": str(tmp_path / "secret"),
        "ESD_AUDIT_KEY_FILE": str(tmp_path / "audit"),
        "ESD_VERIFYING_KEY_FILE": str(tmp_path / "verifying.pem"),
        "ESD_IDENTITY_ADDRESS": peers.address,
        "ESD_INFERENCE_ADDRESS": peers.address,
        "ESD_MODELS_ADDRESS": peers.address,
        "ESD_PUBLIC_URL": f"http://{peers.address}",
        "ESD_WORKER_DIR": str(tmp_path / "workers"),
        "ESD_WORKER_COMMAND": f'["{sys.executable}", "-m", "tests.services.endpoints.standin_worker"]',
        "ESD_DEVICE": "cpu",
    }


StartService = Callable[[], Awaitable[Process]]


@pytest.fixture
async def start_service(service_environment: dict[str, str], store: EndpointStore) -> AsyncIterator[StartService]:
    """Starts the service as a process. None of these, nor a worker of theirs, outlives the test."""
    started: list[Process] = []

    async def start() -> Process:
        command = [sys.executable, "-m", "services.endpoints"]
        started.append(await asyncio.create_subprocess_exec(*command, env=service_environment, cwd=ROOT))
        return started[-1]

    yield start
    for process in started:
        if process.returncode is None:
            process.kill()
            await process.wait()
    for row in await store.get_workers():
        if row.pid is not None and is_alive(row.pid):
            os.kill(row.pid, signal.SIGKILL)


@dataclass
class RunningLoop:
    """A control loop that runs until it is stopped; its workers run on."""

    task: asyncio.Task[None]
    cluster: LocalCluster

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.cluster.close()


RunLoop = Callable[..., RunningLoop]


@pytest.fixture
async def run_loop(
    store: EndpointStore,
    task_store: TaskStore,
    database: Database,
    clients: tuple[Identity, Queue],
    peers: Peers,
    tmp_path: Path,
) -> AsyncIterator[RunLoop]:
    verifying_key_file = tmp_path / "verifying.pem"
    running: list[RunningLoop] = []

    def run(
        command: list[str] | None = None,
        stop_seconds: float = 10,
        gpus: tuple[str, ...] = (),
        policy: ScalingPolicy | None = None,
        **how: Any,
    ) -> RunningLoop:
        settings = LocalSettings(
            command=command or STANDIN_WORKER,
            folder=tmp_path / "workers",
            server_url=f"http://{peers.address}",
            verifying_key_file=verifying_key_file,
            device="cpu",
            gpus=list(gpus),
            drain_seconds=stop_seconds / 2,
            leave_seconds=stop_seconds / 2,
            **how,
        )
        wake = asyncio.Event()
        cluster = LocalCluster(store, task_store, settings, wake.set)
        tasks = TaskControl(task_store, clients[0], cluster, wake)
        control = ControlLoop(store, database, *clients, cluster, tasks, wake, policy or ScalingPolicy())
        running.append(RunningLoop(asyncio.create_task(control.run()), cluster))
        return running[-1]

    yield run
    for loop in running:
        await loop.stop()
    for row in [*await store.get_workers(), *await task_store.get_uncleared()]:
        if row.pid and is_alive(row.pid):
            os.kill(row.pid, 9)
            await until(lambda pid=row.pid: not is_alive(pid))


def is_alive(pid: int) -> bool:
    """Whether the process runs; a child of ours that has ended is reaped."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    return bool(start_time_of(pid))


async def until(condition: Callable[[], Any], seconds: float = 180) -> Any:
    """Waits until the condition, a function or coroutine function, answers something true, and answers that."""
    async with asyncio.timeout(seconds):
        while True:
            answer = condition()
            if asyncio.iscoroutine(answer):
                answer = await answer
            if answer:
                return answer
            await asyncio.sleep(0.05)  # looks from outside: there is nothing to be told by


@pytest.fixture(scope="session")
async def nodes(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ControlPlane]:
    """A control plane with what deploy/kubernetes puts there for workers, and two nodes of two GPUs."""
    if not ASSETS:
        pytest.skip("needs a Kubernetes control plane: set KUBEBUILDER_ASSETS (make test-k8s)")
    folder = tmp_path_factory.mktemp("kubernetes")
    async with control_plane(folder) as plane, await plane.client() as api, AsyncExitStack() as stack:
        await prepare(api)
        for number in (1, 2):
            await stack.enter_async_context(ProcessKubelet(api, f"node-{number}", 2, folder))
        yield plane


@pytest.fixture
async def make_kubernetes(nodes: ControlPlane, peers: Peers) -> AsyncIterator[Callable[..., Awaitable[Cluster]]]:
    """Makes a cluster that runs this command in pods, as the service account of the endpoints service."""
    async with AsyncExitStack() as stack:
        token = await account_token(nodes)

        async def make(
            command: list[str] = STANDIN_WORKER,
            on_change: Callable[[], None] = lambda: None,
            gpu_priority: Literal["pools", "tasks"] = "pools",
            has_keda: bool = False,
            **how: Any,
        ) -> Cluster:
            settings = KubernetesSettings(
                image="worker:1",
                server_url=f"http://{peers.address}",
                command=command,
                profiles={
                    "one-gpu": Profile(gpus=1, cpu="100m", memory="64Mi"),
                    "cpu": Profile(gpus=0, cpu="100m", memory="64Mi"),
                },
                cache_gib=1,
                kubeconfig=nodes.kubeconfig(token),
                **how,
            )
            return await stack.enter_async_context(kubernetes.running(settings, 5, gpu_priority, has_keda, on_change))

        yield make
