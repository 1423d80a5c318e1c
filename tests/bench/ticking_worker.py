"""A worker that holds jobs for ever and tells a step of each twice a second: `python -m tests.bench.ticking_worker`.

The step it tells is the time: milliseconds of the machine's monotonic clock, by which a watcher on the same machine
sees how long the telling took.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

from esd.inference.v1 import inference_pb2 as pb
from esd.inference.v1 import inference_pb2_grpc
from esd.worker.v1 import worker_pb2
from services.common.clients import TokenSource, channel
from services.common.process import die_with_launcher

TICK_SECONDS = 0.5
_NUM_JOBS = 10_000
_STEP_BITS = 31


def now_milliseconds() -> int:
    """The time, as a step has room for it."""
    return time.monotonic_ns() // 1_000_000 % 2**_STEP_BITS


class _TickingWorker:
    def __init__(self) -> None:
        self._outbox: asyncio.Queue[pb.WorkRequest] = asyncio.Queue()
        self._ticking: list[asyncio.Task[None]] = []

    async def run(self, address: str, secret: str) -> None:
        """Serves the queue for as long as the stream lasts."""
        stub = inference_pb2_grpc.QueueServiceStub(channel(address, TokenSource(address, secret)))
        self._outbox.put_nowait(pb.WorkRequest(hello=pb.Hello(worker_id=os.environ["ESD_WORKER_ID"])))
        self._outbox.put_nowait(pb.WorkRequest(want=pb.Want(num_jobs=_NUM_JOBS)))
        async for message in stub.Work(self._requests()):
            if message.WhichOneof("message") == "assign":
                self._ticking.append(asyncio.create_task(self._tick(message.assign.lease_id)))

    async def _requests(self) -> AsyncIterator[pb.WorkRequest]:
        while True:
            yield await self._outbox.get()

    async def _tick(self, lease_id: str) -> None:
        self._tell(lease_id, worker_pb2.JobEvent(started=worker_pb2.JobStarted()))
        while True:
            await asyncio.sleep(TICK_SECONDS)
            progress = worker_pb2.JobProgress(step=now_milliseconds(), num_steps=2**_STEP_BITS - 1)
            self._tell(lease_id, worker_pb2.JobEvent(progress=progress))

    def _tell(self, lease_id: str, event: worker_pb2.JobEvent) -> None:
        self._outbox.put_nowait(pb.WorkRequest(event=pb.LeasedEvent(lease_id=lease_id, event=event)))


if __name__ == "__main__":
    die_with_launcher()
    _address = os.environ["ESD_SERVER_URL"].removeprefix("http://")
    asyncio.run(_TickingWorker().run(_address, Path(os.environ["ESD_SECRET_FILE"]).read_text().strip()))
