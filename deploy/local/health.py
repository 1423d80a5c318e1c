"""Owns the questions whether a part of the stack works now."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc

_SECONDS = 2.0


async def serving(address: str) -> bool:
    """Whether the gRPC service at host:port says SERVING."""
    async with grpc.aio.insecure_channel(address) as channel:
        try:
            answer = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=_SECONDS, wait_for_ready=True
            )
        except grpc.aio.AioRpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def gateway_opens(url: str, api_key: str) -> bool | None:
    """Whether the gateway opens to the key; None if it, or identity behind it, does not answer. It goes past proxies,
    and to any certificate: to this machine.
    """
    async with httpx.AsyncClient(verify=False, trust_env=False, timeout=_SECONDS) as client:  # noqa: S501
        try:
            answer = await client.get(f"{url}/ping", headers={"x-api-key": api_key})
        except httpx.TransportError:
            return None
    opens: dict[int, bool] = {httpx.codes.OK: True, httpx.codes.FORBIDDEN: False}
    return opens.get(answer.status_code)


def accepts(port: int) -> bool:
    """Whether something accepts connections on the loopback port."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=_SECONDS).close()
    except OSError:
        return False
    return True


def distrust(url: str, trust_file: Path) -> str | None:
    """Why workers who go by the certificates in the file cannot reach the https URL; None if they can."""
    parts = urlsplit(url)
    try:
        with (
            socket.create_connection((parts.hostname, parts.port or 443), timeout=_SECONDS) as connection,
            ssl.create_default_context(cafile=trust_file).wrap_socket(connection, server_hostname=parts.hostname),
        ):
            return None
    except ssl.SSLCertVerificationError as error:
        return error.verify_message.rstrip(".")
    except OSError as error:
        return error.strerror or str(error)
