"""Owns a web server of files that imports come from: it redirects, stops in the middle and goes on as it is told."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass
class Source:
    """A web server of files. `stop_after[path]` lists after how many bytes answers end, one entry per request."""

    port: int = 0
    files: dict[str, bytes] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    statuses: dict[str, list[int]] = field(default_factory=dict)
    stop_after: dict[str, list[int]] = field(default_factory=dict)
    validator: str = 'ETag: "one"'
    chunked: bool = False
    asked: list[tuple[str, str]] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def put(self, path: str, content: bytes) -> str:
        self.files[path] = content
        return self.url(path)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._answer((await reader.readuntil(b"\r\n\r\n")).decode(), writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _answer(self, request: str, writer: asyncio.StreamWriter) -> None:
        path = request.split(" ")[1].partition("?")[0]
        wanted = re.search(r"(?i)\r\nrange: bytes=(\d+)-", request)
        same = re.search(r"(?i)\r\nif-range: (.+?)\r\n", request)
        self.asked.append((path, wanted[1] if wanted else ""))
        if path in self.redirects:
            writer.write(f"HTTP/1.1 307 T\r\nLocation: {self.redirects[path]}\r\nContent-Length: 0\r\n\r\n".encode())
            return
        status = self.statuses[path].pop(0) if self.statuses.get(path) else 200 if path in self.files else 404
        content, first = self.files.get(path, b""), 0
        if status == 200 and wanted and same and same[1] in self.validator:
            status, first = 206, int(wanted[1])
        head = f"HTTP/1.1 {status} X\r\n{self.validator}\r\n{self.heads.get(path, '')}"
        if status == 206:
            head += f"Content-Range: bytes {first}-{len(content) - 1}/{len(content)}\r\n"
        body = content[first:]
        head += "Connection: close\r\n" + ("" if self.chunked else f"Content-Length: {len(body)}\r\n")
        writer.write(head.encode() + b"\r\n")
        if self.stop_after.get(path):
            writer.write(body[: self.stop_after[path].pop(0)])
            await writer.drain()
            await self.gate.wait()
        else:
            writer.write(body)
        await writer.drain()


@asynccontextmanager
async def serving_files() -> AsyncIterator[Source]:
    source = Source()
    source.gate.set()
    server = await asyncio.start_server(source.answer, "127.0.0.1", 0)
    source.port = server.sockets[0].getsockname()[1]
    yield source
    source.gate.set()
    server.close()
    await server.wait_closed()
