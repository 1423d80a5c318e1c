"""Where workers and trainers dial in."""

from __future__ import annotations

from urllib.parse import urlsplit

import grpc


def gateway(url: str) -> tuple[str, grpc.ChannelCredentials | None]:
    """`host:port` of the gateway, and credentials where the URL says https."""
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    return f"{parts.hostname}:{port}", grpc.ssl_channel_credentials() if secure else None
