"""QueueService: the streams of workers, and the state of the pools for whoever runs them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from uuid import UUID

import grpc

from esd.inference.v1 import inference_pb2 as pb
from esd.inference.v1 import inference_pb2_grpc
from services.common.auth import current_caller
from services.common.errors import PermissionDenied, Unavailable
from services.common.notifications import Notifications
from services.common.tasks import first, heard
from services.inference.channels import JOB_ENDED, JOBS_QUEUED, POOLS_CHANGED
from services.inference.queue.domain import Queue
from services.inference.queue.pins import Pins
from services.inference.queue.pool_store import PoolState, PoolStore
from services.inference.queue.retired import RetiredEndpoints
from services.inference.queue.session import RECONNECT, WorkSession
from services.inference.watching.hub import Hub

_POOLS_AT_LEAST_SECONDS = 5.0
_POOLS_AT_MOST_SECONDS = 0.2  # a burst of changes is told once


class QueueServicer(inference_pb2_grpc.QueueServiceServicer):
    """Speaks to workers and to the endpoints service. `stopping` ends the streams, so that callers go elsewhere."""

    def __init__(
        self,
        queue: Queue,
        pools: PoolStore,
        retired: RetiredEndpoints,
        pins: Pins,
        notifications: Notifications,
        hub: Hub,
        stopping: asyncio.Event,
    ) -> None:
        self._queue = queue
        self._pools = pools
        self._retired = retired
        self._pins = pins
        self._notifications = notifications
        self._hub = hub
        self._stopping = stopping

    async def Work(
        self, request_iterator: AsyncIterator[pb.WorkRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.WorkResponse]:
        endpoint_id = _endpoint_of_token()
        session = WorkSession(self._queue, self._pins, self._notifications, self._hub, endpoint_id)
        work = asyncio.create_task(session.run(request_iterator, self._stopping))
        try:
            while (message := await session.outbox.get()) is not None:
                yield message
            await work
        finally:
            work.cancel()
            await asyncio.wait([work])  # for its jobs, before this process may end

    async def WatchPools(
        self, request: pb.WatchPoolsRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.WatchPoolsResponse]:
        told: pb.WatchPoolsResponse | None = None
        loop = asyncio.get_running_loop()
        tell_by = loop.time()
        with self._notifications.subscribed((POOLS_CHANGED, ""), (JOBS_QUEUED, ""), (JOB_ENDED, "")) as changed:
            while not self._stopping.is_set():
                state = _pools(await self._pools.pools())
                if state != told or loop.time() >= tell_by:
                    yield state
                    told, tell_by = state, loop.time() + _POOLS_AT_LEAST_SECONDS
                await first(self._stopping.wait(), asyncio.sleep(_POOLS_AT_MOST_SECONDS))
                await first(self._stopping.wait(), heard(changed, tell_by - loop.time()))
        raise Unavailable(RECONNECT)

    async def RetireEndpoint(
        self, request: pb.RetireEndpointRequest, context: grpc.aio.ServicerContext
    ) -> pb.RetireEndpointResponse:
        moved, failed = await self._retired.retire(UUID(request.endpoint_id), request.reason)
        return pb.RetireEndpointResponse(num_moved=moved, num_failed=failed)

    async def PinModels(self, request: pb.PinModelsRequest, context: grpc.aio.ServicerContext) -> pb.PinModelsResponse:
        await self._pins.pin(UUID(request.endpoint_id), list(request.names))
        return pb.PinModelsResponse()


def _endpoint_of_token() -> UUID:
    name = current_caller().name
    try:
        return UUID(name)
    except ValueError:
        raise PermissionDenied(f"the token is for {name!r}, which is no endpoint") from None


def _pools(pools: dict[UUID, PoolState]) -> pb.WatchPoolsResponse:
    return pb.WatchPoolsResponse(
        pools=[
            pb.Pool(
                endpoint_id=str(endpoint),
                worker_ids=pool.worker_ids,
                num_queued=pool.num_queued,
                num_running=pool.num_held,
                work_seconds=pool.work_seconds,
            )
            for endpoint, pool in sorted(pools.items())
        ]
    )
