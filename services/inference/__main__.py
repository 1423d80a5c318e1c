"""The inference service: reads settings, builds the parts, serves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

from pydantic import Field, Json

from esd.inference.v1 import externalscaler_pb2_grpc, inference_pb2_grpc
from services.common import logs
from services.common.auth import Verifier
from services.common.blobs import Blobs
from services.common.clients import TokenSource, channel, token_review
from services.common.database import Database
from services.common.leftovers import LeftoverStore
from services.common.notifications import Notifications
from services.common.outbound import Outbound
from services.common.process import refuse
from services.common.server import Server, mutual_tls
from services.common.settings import Address, BlobSettings, Networks, ServiceSettings, load, read_secret
from services.common.tasks import Background
from services.inference.channels import CHANNELS
from services.inference.domain import Inference
from services.inference.peers import Peers
from services.inference.queue.domain import Limits, Queue
from services.inference.queue.pins import Pins
from services.inference.queue.pool_store import PoolStore
from services.inference.queue.retired import RetiredEndpoints
from services.inference.queue.scaler import ScalerServicer
from services.inference.queue.servicer import QueueServicer
from services.inference.queue.store import LeaseStore
from services.inference.servicer import InferenceServicer
from services.inference.store import JobStore
from services.inference.submitting.payload import MAX_BYTES
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

PriorityBound = Annotated[int, Field(ge=-100, le=100)]


class InferenceSettings(ServiceSettings):
    """The service's own settings beside those of every service."""

    identity_address: Address
    models_address: Address
    endpoints_address: Address
    lease_seconds: float = Field(
        Limits.lease_seconds, ge=10.0, description="silence after which a worker's jobs go to others"
    )
    grace_seconds: float = Field(
        Limits.grace_seconds, ge=0.0, description="time for a worker whose stream broke to come back"
    )
    store_outage_seconds: float = Field(
        Limits.outage_seconds,
        ge=0.0,
        description="time for which a job is tried again while workers cannot reach the object store",
    )
    max_queued_jobs_per_user: int = Field(
        1000, ge=0, description="jobs of one user that may wait at once; 0: any number"
    )
    max_gpu_seconds_per_hour: float = Field(0.0, ge=0.0, description="GPU time of one user within an hour; 0: any")
    retention_days: float = Field(0.0, ge=0.0, description="days until jobs are removed with their objects; 0: never")
    priority_ranges: Json[dict[str, tuple[PriorityBound, PriorityBound]]] = Field(
        DEFAULT_RANGES,
        description="lowest and highest priority by role, `*` for every role, as JSON",
        validate_default=False,
    )
    keda_listen: str = Field("", description="where KEDA asks for the backlog of pools; empty: nowhere")
    keda_certificates: Path | None = Field(
        None, description="folder with tls.crt, tls.key and ca.crt for that; only who has the CA's certificate may ask"
    )
    webhook_allowed_networks: Networks = Field(
        default=[], description="networks besides the public ones where webhooks may be, as JSON"
    )


@asynccontextmanager
async def keda_door(settings: InferenceSettings, verifier: Verifier, servicer: ScalerServicer) -> AsyncIterator[None]:
    """Serves KEDA during the block, if the settings say so.

    Raises:
        SystemExit: there are no certificates, or the address cannot be bound.
    """
    if not settings.keda_listen:
        yield
        return
    if settings.keda_certificates is None:
        refuse("setting ESD_KEDA_CERTIFICATES: Field required when ESD_KEDA_LISTEN is set")
    credentials = mutual_tls(settings.keda_certificates)
    server = Server(settings.keda_listen, verifier, credentials=credentials, setting="ESD_KEDA_LISTEN")
    externalscaler_pb2_grpc.add_ExternalScalerServicer_to_server(servicer, server.grpc)
    await server.start()
    try:
        yield
    finally:
        await server.stop(grace_seconds=1)


async def main() -> None:
    """Runs until told to stop."""
    settings = load(InferenceSettings)
    logs.configure("inference", settings)
    database = Database(settings.database_url)
    await database.migrate("inference")
    tokens = TokenSource(settings.identity_address, read_secret(settings.secret_file))
    identity = channel(settings.identity_address, tokens)
    peers = Peers(
        endpoints=channel(settings.endpoints_address, tokens),
        models=channel(settings.models_address, tokens),
        identity=identity,
    )
    verifier = Verifier.from_file(settings.verifying_key_file, audience="inference")
    # A job may bring its payload with it.
    server = Server(settings.listen, verifier, token_review(identity), max_message_bytes=MAX_BYTES)
    notifications, background, blobs = Notifications(), Background(), Blobs(load(BlobSettings))
    pools, leftovers = PoolStore(database), LeftoverStore(database)
    limits = Limits(
        lease_seconds=settings.lease_seconds,
        renew_seconds=settings.lease_seconds / 6,
        grace_seconds=settings.grace_seconds,
        outage_seconds=settings.store_outage_seconds,
    )
    jobs = JobStore(database, Quotas(settings.max_queued_jobs_per_user, settings.max_gpu_seconds_per_hour))
    retired = RetiredEndpoints(pools, peers)
    cleaner = Cleaner(leftovers, jobs, blobs, limits.renew_seconds, settings.retention_days)
    outputs = Outputs(jobs, blobs)
    queue = Queue(LeaseStore(database), blobs, leftovers, outputs, background, limits)
    priorities = Priorities(settings.priority_ranges)
    inference = Inference(jobs, blobs, peers, notifications, cleaner, priorities, server.stopping)
    hub, views = Hub(WatchStore(database), notifications), Views(blobs)
    webhooks = Webhooks(WebhookStore(database), Outbound(settings.webhook_allowed_networks), notifications)
    servicer = InferenceServicer(inference, views, Events(inference, views, hub), webhooks)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server.grpc)
    pins = Pins(pools, peers, blobs)
    workers = QueueServicer(queue, pools, retired, pins, notifications, hub, server.stopping)
    inference_pb2_grpc.add_QueueServiceServicer_to_server(workers, server.grpc)
    async with keda_door(settings, verifier, ScalerServicer(pools, notifications, server.stopping)):
        await server.run(
            database.listen(CHANNELS, notifications.on_notify),
            notifications.wake_all(at=server.stopping),
            queue.run(),
            retired.run(limits.renew_seconds),
            cleaner.run(),
            outputs.run(),
            hub.run(server.stopping),
            Deadlines(jobs, notifications).run(),
            webhooks.run(),
        )
    await background.stop()
    await database.dispose()


if __name__ == "__main__":
    asyncio.run(main())
