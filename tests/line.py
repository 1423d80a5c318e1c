"""A line between two parts of the product: a TCP relay whose connections can be cut, held up, or shut out."""

from __future__ import annotations

import asyncio
import random
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

_CHUNK_BYTES = 1 << 16


class _Connection:
    """One connection of a client and the one to the server that it is relayed to."""

    def __init__(self, line: Line, *writers: asyncio.StreamWriter) -> None:
        self._line = line
        self._writers = writers
        self._flows = asyncio.Event()
        self._flows.set()

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Relays one direction to its end."""
        try:
            while data := await reader.read(_CHUNK_BYTES):
                await self._flows.wait()
                writer.write(self._line.admit(data))
                await writer.drain()
                if self._line.is_shut:
                    self._line.cut()
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
    """Listens at `address`; relays to the server at `url` from the moment that is set. `gone` says that it is shut."""

    def __init__(self) -> None:
        self.url = ""
        self.address = ""
        self.gone = asyncio.Event()
        self._connections: dict[_Connection, asyncio.Task[None]] = {}
        self._bytes_left: int | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()
        self.address = f"{host}:{port}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.close()
        self.cut()
        await asyncio.gather(*self._connections.values(), return_exceptions=True)

    def pick(self, rng: random.Random) -> _Connection | None:
        """One of the open connections."""
        return rng.choice(list(self._connections)) if self._connections else None

    @property
    def is_shut(self) -> bool:
        """Whether nothing passes."""
        return self._bytes_left == 0

    def shut(self, after_bytes: int = 0) -> None:
        """Lets so many bytes more pass, in both directions together, and then nothing until open()."""
        self._bytes_left = after_bytes
        self.admit(b"")
        if self.is_shut:
            self.cut()

    def open(self) -> None:
        """Lets everything pass again."""
        self._bytes_left = None
        self.gone.clear()

    def admit(self, data: bytes) -> bytes:
        """As much of the data as may pass."""
        if self._bytes_left is not None:
            data = data[: self._bytes_left]
            self._bytes_left -= len(data)
        if self.is_shut:
            self.gone.set()
        return data

    def cut(self) -> None:
        """Cuts all connections."""
        for connection in list(self._connections):
            connection.cut()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        parts = urlsplit(self.url)
        if self.is_shut:
            writer.transport.abort()
            return
        try:
            far_reader, far_writer = await asyncio.open_connection(parts.hostname, parts.port)
        except OSError:
            writer.transport.abort()
            return
        connection = _Connection(self, writer, far_writer)
        task = asyncio.current_task()
        assert task is not None
        self._connections[connection] = task
        try:
            await asyncio.gather(connection.pump(reader, far_writer), connection.pump(far_reader, writer))
        finally:
            connection.cut()
            del self._connections[connection]
