"""A worker that says hello to the queue and does nothing else; with `--stubborn` it ignores SIGTERM."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from esd.inference.v1 import inference_pb2, inference_pb2_grpc
from services.common.clients import TokenSource, channel
from services.common.process import die_with_launcher


async def _hello() -> AsyncIterator[inference_pb2.WorkRequest]:
    yield inference_pb2.WorkRequest(hello=inference_pb2.Hello(worker_id=os.environ["ESD_WORKER_ID"]))
    await asyncio.Event().wait()


async def _main(address: str, secret: str) -> None:
    tokens = TokenSource(address, secret)
    stub = inference_pb2_grpc.QueueServiceStub(channel(address, tokens))
    async for _ in stub.Work(_hello()):
        pass


if __name__ == "__main__":
    die_with_launcher()
    if "--stubborn" in sys.argv:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _address = os.environ["ESD_SERVER_URL"].removeprefix("http://")
    asyncio.run(_main(_address, Path(os.environ["ESD_SECRET_FILE"]).read_text()))
