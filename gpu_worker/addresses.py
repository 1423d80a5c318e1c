"""Where workers and trainers dial in."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

import grpc


def gateway(url: str) -> tuple[str, grpc.ChannelCredentials | None]:
    """`host:port` of the gateway, and credentials where the URL says https."""
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    return f"{parts.hostname}:{port}", grpc.ssl_channel_credentials(_roots()) if secure else None


def _roots() -> bytes | None:
    """The certificates of SSL_CERT_FILE, which HTTP goes by too and gRPC would not; None, gRPC's own, without it."""
    file = os.environ.get("SSL_CERT_FILE")
    return Path(file).read_bytes() if file else None
