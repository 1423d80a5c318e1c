"""The gateway's settings, and the refusal to listen to the world in clear."""

from __future__ import annotations

import ipaddress
import ssl
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from services.common.process import refuse
from services.common.settings import HOST_AND_PORT, Settings

ADDRESS = f"^{HOST_AND_PORT}$"
ADDRESSES = f"^{HOST_AND_PORT}(,{HOST_AND_PORT})*$"


class GatewaySettings(Settings):
    """Addresses are `host:port`, those of a service's replicas with commas between them.

    `base_path` is what a public URL has before the API's paths, such as `/prod`. `metrics_certificates` is a folder
    with `tls.crt`, `tls.key` and `ca.crt`: only who has a certificate of that CA may ask for metrics. Envoy needs up to
    half as much memory again as `max_heap_bytes`, while it transcodes large bodies. At its end the gateway takes new
    connections for `linger_seconds` more, and then gives what is under way `stop_seconds`.
    """

    listen: str = Field("127.0.0.1:8080", pattern=ADDRESS)
    webui_port: int | None = Field(None, ge=1, le=65535)
    base_path: str = Field("", pattern=r"^((/[A-Za-z0-9._~-]+)+/?|/?)$", examples=["/prod"])
    identity_address: str = Field(pattern=ADDRESSES)
    models_address: str = Field(pattern=ADDRESSES)
    endpoints_address: str = Field(pattern=ADDRESSES)
    inference_address: str = Field(pattern=ADDRESSES)
    training_address: str = Field(pattern=ADDRESSES)
    s3_endpoint_url: str | None = Field(None, pattern=r"^https?://[^/?#]+/?$")
    s3_bucket: str = Field("", pattern=r"^([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])?$")
    secret_file: Path
    tls_cert_file: Path | None = None
    tls_key_file: Path | None = None
    insecure: bool = False
    metrics_listen: str | None = Field(None, pattern=ADDRESS)
    metrics_certificates: Path | None = None
    concurrency: int = Field(1, ge=1)
    max_heap_bytes: int = Field(1 << 30, ge=64 << 20)
    linger_seconds: int = Field(0, ge=0)
    stop_seconds: int = Field(10, ge=0)
    run_dir: Path | None = None

    @field_validator("base_path")
    @classmethod
    def _no_trailing_slash(cls, value: str) -> str:
        return value.rstrip("/")

    @property
    def store_address(self) -> str | None:
        """`host:port` of the store whose bucket the gateway passes through; None where clients reach it themselves."""
        if not self.s3_bucket or self.s3_endpoint_url is None:
            return None
        url = urlsplit(self.s3_endpoint_url)
        # A store with TLS of its own is public, and would refuse signatures made for the gateway's host.
        return None if url.scheme == "https" else url.netloc if url.port else f"{url.netloc}:80"


def refuse_open_door(settings: GatewaySettings) -> None:
    """Keys in clear travel inside this machine only, unless somebody says that they know; metrics need a certificate.

    Raises:
        SystemExit: the sentence says which settings to change.
    """
    if (settings.tls_cert_file is None) != (settings.tls_key_file is None):
        refuse("ESD_TLS_CERT_FILE and ESD_TLS_KEY_FILE belong together: set both or neither")
    if settings.tls_cert_file is None and not settings.insecure and not is_loopback(settings.listen):
        refuse(
            f"ESD_LISTEN={settings.listen} is reachable from other machines, and API keys would travel in clear: set "
            "ESD_TLS_CERT_FILE and ESD_TLS_KEY_FILE, or ESD_INSECURE=true where something in front encrypts"
        )
    if settings.metrics_listen and settings.metrics_certificates is None:
        refuse("setting ESD_METRICS_CERTIFICATES: Field required when ESD_METRICS_LISTEN is set")


def refuse_unusable_certificate(settings: GatewaySettings) -> None:
    """Envoy would start with any certificate, waiting for a better one.

    Raises:
        SystemExit: the files are not there, not PEM, or do not belong together.
    """
    if settings.tls_cert_file is None or settings.tls_key_file is None:
        return
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(settings.tls_cert_file, settings.tls_key_file, password="")  # asks nobody
    except OSError as error:  # ssl.SSLError is one
        refuse(
            f"ESD_TLS_CERT_FILE={settings.tls_cert_file} and ESD_TLS_KEY_FILE={settings.tls_key_file} are no "
            f"certificate and its key: {error.strerror}"
        )


def split_address(address: str) -> tuple[str, int]:
    """`host:port` as host (without the brackets of IPv6) and port."""
    host, port = address.rsplit(":", 1)
    return host.strip("[]"), int(port)


def is_loopback(address: str) -> bool:
    """Whether only this machine can connect to `host:port`."""
    host = split_address(address)[0]
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
