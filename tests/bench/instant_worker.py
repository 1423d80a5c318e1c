"""A worker that ends each job the moment it comes: `python -m tests.bench.instant_worker failed|objects`.

Without objects a job can only fail, which takes the same way through the queue as a success; with objects it uploads a
ready picture and its description first.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx

from esd.inference.v1 import inference_pb2 as pb
from esd.inference.v1 import inference_pb2_grpc
from esd.worker.v1 import worker_pb2
from services.common.clients import TokenSource, channel
from services.common.process import die_with_launcher
from tests.pictures import encoded, noise

REASON = "the benchmark's worker makes no objects"
_JOBS_AT_ONCE = 64


class _InstantWorker:
    def __init__(self, with_objects: bool) -> None:
        self._with_objects = with_objects
        self._outbox: asyncio.Queue[pb.WorkRequest] = asyncio.Queue()
        self._picture = base64.b64decode(encoded(noise()))
        self._store = httpx.AsyncClient()
        self._under_way: set[asyncio.Task[None]] = set()

    async def run(self, address: str, secret: str) -> None:
        """Serves the queue for as long as the stream lasts."""
        stub = inference_pb2_grpc.QueueServiceStub(channel(address, TokenSource(address, secret)))
        self._outbox.put_nowait(pb.WorkRequest(hello=pb.Hello(worker_id=os.environ["ESD_WORKER_ID"])))
        async for message in stub.Work(self._requests()):
            if message.WhichOneof("message") == "welcome":
                self._want()
            elif message.WhichOneof("message") == "assign":
                task = asyncio.create_task(self._end(message.assign))
                self._under_way.add(task)
                task.add_done_callback(self._under_way.discard)

    async def _requests(self) -> AsyncIterator[pb.WorkRequest]:
        while True:
            yield await self._outbox.get()

    async def _end(self, assign: pb.Assign) -> None:
        self._tell(assign, worker_pb2.JobEvent(started=worker_pb2.JobStarted()))
        if not self._with_objects:
            self._tell(assign, worker_pb2.JobEvent(failed=worker_pb2.JobFailed(reason=REASON, nothing_uploaded=True)))
        else:
            spec = assign.spec
            image, param = await asyncio.gather(
                self._upload(spec.image_uploads[0], self._picture), self._upload(spec.param_upload, b"{}")
            )
            self._tell(assign, worker_pb2.JobEvent(done=worker_pb2.JobDone(images=[image], param=param)))
        self._want()

    async def _upload(self, upload: worker_pb2.Upload, content: bytes) -> worker_pb2.ResultObject:
        (await self._store.put(upload.url, content=content)).raise_for_status()
        sha256 = hashlib.sha256(content).hexdigest()
        return worker_pb2.ResultObject(name=upload.name, size_bytes=len(content), sha256=sha256)

    def _tell(self, assign: pb.Assign, event: worker_pb2.JobEvent) -> None:
        self._outbox.put_nowait(pb.WorkRequest(event=pb.LeasedEvent(lease_id=assign.lease_id, event=event)))

    def _want(self) -> None:
        self._outbox.put_nowait(pb.WorkRequest(want=pb.Want(num_jobs=_JOBS_AT_ONCE - len(self._under_way))))


async def _main(address: str, secret: str) -> None:
    await _InstantWorker(sys.argv[1] == "objects").run(address, secret)


if __name__ == "__main__":
    die_with_launcher()
    _address = os.environ["ESD_SERVER_URL"].removeprefix("http://")
    asyncio.run(_main(_address, Path(os.environ["ESD_SECRET_FILE"]).read_text()))
