"""The line between the workers and the gateway: a TCP relay whose connections can be cut or held up."""

from __future__ import annotations

import asyncio
import random
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

_CHUNK_BYTES = 1 << 16


class _Connection:
    """One connection of a worker and the one to the gateway that it is relayed to."""

    def __init__(self, *writers: asyncio.StreamWriter) -> None:
        self._writers = writers
        self._flows = asyncio.Event()
        self._flows.set()

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Relays one direction to its end."""
        try:
            while data := await reader.read(_CHUNK_BYTES):
                await self._flows.wait()
                writer.write(data)
                await writer.drain()
            writer.write_eof()
        except OSError:
            self.cut()

    def cut(self) -> None:
        """Resets both ends."""
        for writer in self._writers:
            writer.transport.abort()

    async def hold(self, seconds: float) -> None:
        """Lets nothing through for so long; nothing is lost."""
        self._flows.clear()
        await asyncio.sleep(seconds)
        self._flows.set()


class Line:
    """Listens at `address`; relays to the gateway at `url` from the moment that is set."""

    def __init__(self) -> None:
        self.url = ""
        self.address = ""
        self._connections: dict[_Connection, asyncio.Task[None]] = {}

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()
        self.address = f"{host}:{port}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.close()
        for connection in list(self._connections):
            connection.cut()
        await asyncio.gather(*self._connections.values(), return_exceptions=True)

    def pick(self, rng: random.Random) -> _Connection | None:
        """One of the open connections."""
        return rng.choice(list(self._connections)) if self._connections else None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        parts = urlsplit(self.url)
        try:
            far_reader, far_writer = await asyncio.open_connection(parts.hostname, parts.port)
        except OSError:
            writer.transport.abort()
            return
        connection = _Connection(writer, far_writer)
        task = asyncio.current_task()
        assert task is not None
        self._connections[connection] = task
        try:
            await asyncio.gather(connection.pump(reader, far_writer), connection.pump(far_reader, writer))
        finally:
            connection.cut()
            del self._connections[connection]
