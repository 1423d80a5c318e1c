"""GpuWorkerService: the worker's own door, for internal callers, tests and debugging."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc

from esd.worker.v1 import worker_pb2, worker_pb2_grpc
from gpu_worker.job import Job
from gpu_worker.worker import Worker, is_last
from services.common.auth import TOKEN_METADATA, Kind, Verifier
from services.common.errors import Unauthenticated


class GpuWorkerServicer(worker_pb2_grpc.GpuWorkerServiceServicer):
    """Runs jobs beside those of the queue, for callers with a service's token."""

    def __init__(self, worker: Worker, verifier: Verifier) -> None:
        self._worker = worker
        self._verifier = verifier

    async def Generate(
        self, request: worker_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.GenerateResponse]:
        """Streams the job's events; the job is cancelled when the caller hangs up."""
        await self._admit(context)
        if not self._worker.room:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the worker has no room for another job")
        events: asyncio.Queue[worker_pb2.JobEvent] = asyncio.Queue()
        job = Job(request.spec, events.put_nowait)
        self._worker.submit(job)
        try:
            while True:
                event = await events.get()
                yield worker_pb2.GenerateResponse(event=event)
                if is_last(event):
                    return
        finally:
            job.cancel()

    async def _admit(self, context: grpc.aio.ServicerContext) -> None:
        token = str(dict(context.invocation_metadata() or ()).get(TOKEN_METADATA, ""))
        try:
            caller = self._verifier.verify(token)
        except Unauthenticated as error:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
        if caller.kind != Kind.SERVICE:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"this is not open to a {caller.kind}")
