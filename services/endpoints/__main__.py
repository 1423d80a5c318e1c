"""Puts the endpoints service together and runs it: `python -m services.endpoints`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

from pydantic import Field, Json, ValidationInfo, field_validator

from esd.endpoints.v1 import endpoints_pb2_grpc as rpc
from services.common import logs
from services.common.audit import Audit
from services.common.auth import Verifier
from services.common.clients import TokenSource, channel
from services.common.database import Database
from services.common.process import refuse
from services.common.server import Server
from services.common.settings import SOME_URLS, URL, Address, AuditedSettings, load, read_secret
from services.endpoints.cluster import Cluster
from services.endpoints.cluster.gpus import find_gpus
from services.endpoints.cluster.local import LocalCluster
from services.endpoints.cluster.machine import LocalSettings
from services.endpoints.domain import Endpoints
from services.endpoints.event_store import EventStore
from services.endpoints.peers import Identity, Models, Queue
from services.endpoints.reconcile import ControlLoop
from services.endpoints.scaling import ScalingPolicy
from services.endpoints.servicer import EndpointsServicer
from services.endpoints.store import EndpointStore
from services.endpoints.task_control import TaskControl
from services.endpoints.task_servicer import TaskServicer
from services.endpoints.task_store import TaskStore
from services.endpoints.tasks import Tasks


class EndpointsSettings(AuditedSettings):
    """`worker_dir` keeps the secrets, logs and model cache of local workers, who dial the gateway at `public_url`;
    `max_instances` bounds one endpoint.

    A worker that is stopped may take `drain_seconds` to finish its job. Local workers and tasks run on when the
    service ends, and the next one adopts them; with `keep_workers` off they leave, since a container takes along
    all that it has. With `cluster` kubernetes, the settings of cluster/kubernetes_api.py say how workers run; those
    of scaling.py say how many.
    """

    identity_address: Address
    models_address: Address
    inference_address: Address
    cluster: Literal["local", "kubernetes"] = "local"
    worker_dir: Path | None = None
    public_url: str = Field("http://127.0.0.1:8080", pattern=URL, examples=SOME_URLS)
    keep_workers: bool = True
    worker_command: Json[list[str]] = Field([sys.executable, "-m", "gpu_worker"], min_length=1, validate_default=False)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_instances: int = Field(64, ge=1)
    drain_seconds: float = Field(60.0, ge=0)
    # Who gets a GPU that both a pool and a task wait for; with `tasks`, workers also leave GPUs that tasks wait for.
    gpu_priority: Literal["pools", "tasks"] = "pools"
    # How many tasks run at a time on a machine without a GPU.
    max_cpu_tasks: int = Field(1, ge=0)
    # Who scales pools that follow their load: the control loop, or KEDA in the cluster, asking the inference service.
    autoscaler: Literal["own", "keda"] = "own"

    @field_validator("autoscaler")
    @classmethod
    def _keda_needs_kubernetes(cls, value: str, info: ValidationInfo) -> str:
        if value == "keda" and info.data.get("cluster") != "kubernetes":
            raise ValueError("keda scales what runs with ESD_CLUSTER=kubernetes only")
        return value

    def local(self) -> LocalSettings:
        """How workers run on this machine.

        Raises:
            SystemExit: nobody said where.
        """
        if self.worker_dir is None:
            refuse("setting ESD_WORKER_DIR: Field required when ESD_CLUSTER is local")
        return LocalSettings(
            command=self.worker_command,
            folder=self.worker_dir.resolve(),
            server_url=self.public_url,
            verifying_key_file=self.verifying_key_file.resolve(),
            device=self.device,
            gpus=[] if self.device == "cpu" else find_gpus(),
            tasks_first=self.gpu_priority == "tasks",
            max_cpu_tasks=self.max_cpu_tasks,
            drain_seconds=self.drain_seconds,
        )


@asynccontextmanager
async def running_cluster(
    settings: EndpointsSettings, store: EndpointStore, tasks: TaskStore, on_change: Callable[[], None]
) -> AsyncIterator[Cluster]:
    """What runs the workers, which run on after the block, unless the settings say otherwise."""
    if settings.cluster == "kubernetes":
        from services.endpoints.cluster import kubernetes, kubernetes_api  # noqa: PLC0415 - of the extra `kubernetes`

        own = load(kubernetes_api.KubernetesSettings)
        has_keda = settings.autoscaler == "keda"
        async with kubernetes.running(
            own, settings.drain_seconds, settings.gpu_priority, has_keda, on_change
        ) as cluster:
            yield cluster
        return
    local = LocalCluster(store, tasks, settings.local(), on_change)
    try:
        yield local
    finally:
        if not settings.keep_workers:
            await local.end()
        local.close()


async def main(settings: EndpointsSettings) -> None:
    """Serves and reconciles until told to stop; workers run on."""
    policy = load(ScalingPolicy)
    database = Database(settings.database_url)
    await database.migrate("endpoints")
    audit = Audit.from_file("endpoints", settings.audit_key_file)
    store, tasks = EndpointStore(database, audit), TaskStore(database)
    tokens = TokenSource(settings.identity_address, read_secret(settings.secret_file))
    identity = Identity(channel(settings.identity_address, tokens))
    queue = Queue(channel(settings.inference_address, tokens))
    models = Models(channel(settings.models_address, tokens))
    wake = asyncio.Event()
    server = Server(settings.listen, Verifier.from_file(settings.verifying_key_file))
    rpc.add_EndpointsServiceServicer_to_server(
        EndpointsServicer(Endpoints(store, EventStore(database), identity, models, settings.max_instances)), server.grpc
    )
    rpc.add_TaskServiceServicer_to_server(TaskServicer(Tasks(tasks)), server.grpc)
    async with running_cluster(settings, store, tasks, wake.set) as cluster:
        task_control = TaskControl(tasks, identity, cluster, wake)
        by_cluster = settings.autoscaler == "keda"
        control = ControlLoop(store, database, identity, queue, cluster, task_control, wake, policy, by_cluster)
        await server.run(control.run(), audit.log_heads(database))
    await database.dispose()


if __name__ == "__main__":
    _settings = load(EndpointsSettings)
    logs.configure("endpoints", _settings)
    asyncio.run(main(_settings))
