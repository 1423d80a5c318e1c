"""Puts the endpoints service together and runs it: `python -m services.endpoints`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Literal

from pydantic import Field

from esd.endpoints.v1 import endpoints_pb2_grpc as rpc
from services.common import logs
from services.common.audit import Audit
from services.common.auth import Verifier
from services.common.clients import TokenSource, channel
from services.common.database import Database
from services.common.server import Server
from services.common.settings import AuditedSettings, load, read_secret
from services.endpoints.cluster.local import LocalCluster, LocalSettings, find_gpus
from services.endpoints.domain import Endpoints
from services.endpoints.peers import Identity, Queue
from services.endpoints.reconcile import ControlLoop
from services.endpoints.servicer import EndpointsServicer
from services.endpoints.store import EndpointStore


class EndpointsSettings(AuditedSettings):
    """`worker_dir` keeps the workers' secrets, logs and model cache; `max_instances` bounds one endpoint.

    A worker that is stopped may take `drain_seconds` to finish its job.
    """

    cluster: Literal["local"] = "local"
    worker_dir: Path
    worker_command: list[str] = Field(default=[sys.executable, "-m", "gpu_worker"], min_length=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_instances: int = Field(64, ge=1)
    drain_seconds: float = Field(60.0, ge=0)

    def local(self) -> LocalSettings:
        """How workers run on this machine."""
        return LocalSettings(
            command=self.worker_command,
            folder=self.worker_dir.resolve(),
            server_url=self.public_url,
            verifying_key_file=self.verifying_key_file.resolve(),
            device=self.device,
            gpus=[] if self.device == "cpu" else find_gpus(),
            drain_seconds=self.drain_seconds,
        )


async def main(settings: EndpointsSettings) -> None:
    """Serves and reconciles until told to stop; workers run on."""
    database = Database(settings.database_url)
    await database.migrate("endpoints")
    audit = Audit.from_file("endpoints", settings.audit_key_file)
    store = EndpointStore(database, audit)
    tokens = TokenSource(settings.identity_address, read_secret(settings.secret_file))
    identity = Identity(channel(settings.identity_address, tokens))
    queue = Queue(channel(settings.inference_address, tokens))
    wake = asyncio.Event()
    cluster = LocalCluster(store, settings.local(), wake.set)
    control = ControlLoop(store, database, identity, queue, cluster, wake)
    server = Server(settings.listen, Verifier.from_file(settings.verifying_key_file))
    rpc.add_EndpointsServiceServicer_to_server(
        EndpointsServicer(Endpoints(store, identity, settings.max_instances)), server.grpc
    )
    async with asyncio.TaskGroup() as group:
        loop = group.create_task(control.run())
        auditing = group.create_task(audit.log_heads(database))
        await server.run()
        loop.cancel()
        auditing.cancel()
    cluster.close()
    await database.dispose()


if __name__ == "__main__":
    _settings = load(EndpointsSettings)
    logs.configure("endpoints", _settings)
    asyncio.run(main(_settings))
