"""The gRPC server that every service runs: its address, health, an orderly end."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from services.common.auth import Verifier
from services.common.interceptor import Interceptor
from services.common.process import refuse
from services.common.streams import OpenStreams, Review
from services.common.tasks import cancel

log = structlog.get_logger()

MAX_MESSAGE_BYTES = 8 * 1024 * 1024  # twice what the gateway takes of a REST request; read before its token is
DRAIN_SECONDS = 10.0
_OPTIONS = [
    # As much as the gateway takes (60 KiB) and its token, instead of 8 KiB.
    ("grpc.max_metadata_size", 64 * 1024),
    ("grpc.absolute_max_metadata_size", 128 * 1024),
    ("grpc.so_reuseport", 0),
    # A kilobyte may unpack to a megabyte, and our answers and pictures are small or packed already: only `identity`.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    # A caller that vanished without a word is noticed, and its streams end.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # The gateway and other services look after us in the same way; by default such pings would end their connections.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
]


class Server:
    """A gRPC server on `host:port`. Add servicers with their generated `add_…_to_server(servicer, server.grpc)`.

    `review` says which tokens still hold; streams whose token does not are ended. Without it a stream ends with its
    token. With `credentials` it speaks TLS. `setting` is where the address comes from.
    """

    def __init__(
        self,
        listen: str,
        verifier: Verifier,
        review: Review | None = None,
        credentials: grpc.ServerCredentials | None = None,
        setting: str = "ESD_LISTEN",
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self._credentials = credentials
        self._setting = setting
        self._streams = OpenStreams(review or _until_they_end(verifier))
        options = [*_OPTIONS, ("grpc.max_receive_message_length", max_message_bytes)]
        self.grpc = grpc.aio.server(interceptors=[Interceptor(verifier, self._streams)], options=options)
        self._listen = listen
        self._health = health.aio.HealthServicer()
        self._stopping = asyncio.Event()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)

    @property
    def stopping(self) -> asyncio.Event:
        """Set when the server was told to stop; long streams end themselves then."""
        return self._stopping

    async def start(self) -> int:
        """Starts serving and answers the port.

        Raises:
            SystemExit: the address cannot be bound. It may be free again soon, so another try may help.
        """
        try:
            if self._credentials is None:
                port = self.grpc.add_insecure_port(self._listen)
            else:
                port = self.grpc.add_secure_port(self._listen, self._credentials)
        except RuntimeError:
            raise SystemExit(f"{self._setting}={self._listen} cannot be bound: is the port in use?") from None
        await self.grpc.start()
        self._reviewing = asyncio.create_task(self._streams.run())
        self._reviewing.add_done_callback(lambda _: self._stopping.set())  # never serve without it
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        log.info("serving", address=self._listen, port=port)
        return port

    async def stop(self, grace_seconds: float = DRAIN_SECONDS) -> None:
        """Says NOT_SERVING, lets calls under way end within the grace, then stops."""
        self._stopping.set()
        await self._health.enter_graceful_shutdown()
        await self.grpc.stop(grace_seconds)
        self._reviewing.cancel()
        await asyncio.wait([self._reviewing])

    async def run(self, *chores: Coroutine[Any, Any, object]) -> None:
        """Serves until SIGTERM or SIGINT, then drains. The chores run beside it; one that fails or ends takes the
        server with it, so that the process is started again."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        tasks = [asyncio.create_task(chore) for chore in chores]
        for task in tasks:
            task.add_done_callback(lambda _: self._stopping.set())
        # What was imported stays: without this the collector goes through all of it again and again.
        gc.collect()
        gc.freeze()
        await self.start()
        await self._stopping.wait()
        await self.stop()
        await cancel(tasks)
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome


def _until_they_end(verifier: Verifier) -> Review:
    async def review(tokens: Sequence[str]) -> Sequence[bool]:
        return [verifier.holds(token) for token in tokens]

    return review


def mutual_tls(folder: Path) -> grpc.ServerCredentials:
    """Credentials that let in only who has a certificate of the folder's CA: `tls.crt`, `tls.key` and `ca.crt`.

    Raises:
        SystemExit: a file cannot be read.
    """
    try:
        certificate, key, authority = ((folder / name).read_bytes() for name in ("tls.crt", "tls.key", "ca.crt"))
    except OSError as error:
        refuse(f"the certificate file {error.filename} cannot be read: {error.strerror}")
    return grpc.ssl_server_credentials([(key, certificate)], authority, require_client_auth=True)
