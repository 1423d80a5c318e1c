"""The informer in front of an API server that is not there any more, without a word."""

import asyncio
import json
from asyncio import StreamReader, StreamWriter
from contextlib import closing

import pytest
from kubernetes_asyncio import client

from services.endpoints.cluster import informer
from services.endpoints.cluster.informer import Informer

NOTHING = json.dumps({"kind": "PodList", "apiVersion": "v1", "metadata": {"resourceVersion": "7"}, "items": []})


@pytest.mark.timeout(60)
async def test_a_watch_whose_connection_died_silently_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(informer, "_WATCH_SECONDS", 0)
    monkeypatch.setattr(informer, "TIMEOUT_SECONDS", 1)
    watches: asyncio.Queue[None] = asyncio.Queue()

    async def answer(reader: StreamReader, writer: StreamWriter) -> None:
        """Lists nothing, and says nothing more to who watches."""
        with closing(writer):
            while request := await reader.readline():
                while (await reader.readline()).strip():
                    pass  # headers
                head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
                if b"watch=True" in request:
                    writer.write(head + b"transfer-encoding: chunked\r\n\r\n")
                    watches.put_nowait(None)
                else:
                    writer.write(head + f"content-length: {len(NOTHING)}\r\n\r\n{NOTHING}".encode())

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    configuration = client.Configuration(host=f"http://{host}:{port}")
    async with client.ApiClient(configuration) as api, server:
        pods = Informer("pods", client.CoreV1Api(api).list_namespaced_pod, "esd-workers", lambda: None)
        following = asyncio.create_task(pods.run())
        for _ in range(2):
            await watches.get()
        following.cancel()
        await asyncio.wait([following])
