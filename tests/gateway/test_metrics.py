"""The page for Prometheus: what Envoy counts, for who has a certificate, and nothing else of the admin interface."""

from __future__ import annotations

import re
import ssl
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from deploy.kubernetes.certificates import Certificates, make_certificates
from deploy.local.ports import free_port
from tests.gateway.conftest import ROOT, Seen, running_gateway
from tests.gateway.test_start import refusal


@pytest.fixture(scope="module")
def certificates() -> Certificates:
    return make_certificates(["localhost"], "prometheus")


@pytest.fixture
async def address(services: tuple[str, Seen], certificates: Certificates, tmp_path: Path) -> AsyncIterator[str]:
    """The address of the page, of a gateway that has answered one request."""
    port = free_port()
    write(tmp_path / "certificates", certificates.server_files)
    settings = {"ESD_METRICS_LISTEN": f"127.0.0.1:{port}", "ESD_METRICS_CERTIFICATES": str(tmp_path / "certificates")}
    async with running_gateway(tmp_path, services[0], **settings) as gateway:
        assert (await gateway.client.get("/ping")).status_code == 200
        assert stat.S_IMODE((tmp_path / "run" / "admin.socket").stat().st_mode) == 0o600
        yield f"https://localhost:{port}"


def write(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def trust(certificates: Certificates, folder: Path | None = None) -> ssl.SSLContext:
    """Trusts the gateway, and shows the client's certificate if there is a folder to put it into."""
    context = ssl.create_default_context(cadata=certificates.authority.decode())
    if folder is not None:
        write(folder, certificates.client_files)
        context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    return context


async def test_prometheus_reads_requests_statuses_and_times_of_every_service(
    address: str, certificates: Certificates, tmp_path: Path
) -> None:
    async with httpx.AsyncClient(verify=trust(certificates, tmp_path / "client"), timeout=60) as client:
        page = (await client.get(f"{address}/stats/prometheus")).text
    for service in ("identity", "models", "endpoints", "inference", "training"):
        assert f'envoy_cluster_upstream_rq_total{{envoy_cluster_name="{service}"}}' in page
    assert (
        'envoy_http_downstream_rq_xx{envoy_response_code_class="2",envoy_http_conn_manager_prefix="document"} 1' in page
    )
    assert 'envoy_cluster_upstream_rq_time_bucket{envoy_cluster_name="identity"' in page


async def test_what_the_alerts_ask_for_is_told(address: str, certificates: Certificates, tmp_path: Path) -> None:
    async with httpx.AsyncClient(verify=trust(certificates, tmp_path / "client"), timeout=60) as client:
        page = (await client.get(f"{address}/stats/prometheus")).text
    asked = re.findall(r"envoy_\w+(?=\{)", (ROOT / "deploy/kubernetes/components/monitoring/alerts.yaml").read_text())
    assert {name for name in asked if f"\n{name}{{" not in page} == set()
    assert len(asked) > 3


@pytest.mark.parametrize(
    "path", ["/", "/config_dump", "/stats", "/stats/prometheus/", "/certs", "/stats/prometheus/../../certs"]
)
async def test_the_rest_of_the_admin_interface_is_not_there(
    address: str, path: str, certificates: Certificates, tmp_path: Path
) -> None:
    async with httpx.AsyncClient(verify=trust(certificates, tmp_path / "client"), timeout=60) as client:
        assert (await client.get(f"{address}{path}")).status_code == 404
        assert (await client.post(f"{address}/quitquitquit")).status_code == 404
        assert (await client.post(f"{address}/stats/prometheus")).status_code == 404


async def test_nobody_reads_it_without_a_certificate_that_was_made_for_it(
    address: str, certificates: Certificates, tmp_path: Path
) -> None:
    stranger = make_certificates(["localhost"], "prometheus")
    strange = trust(certificates)
    write(tmp_path / "stranger", stranger.client_files)
    strange.load_cert_chain(tmp_path / "stranger" / "tls.crt", tmp_path / "stranger" / "tls.key")
    for context in (trust(certificates), strange):
        async with httpx.AsyncClient(verify=context, timeout=60) as client:
            # The refusal of TLS 1.3 comes after the client's handshake: whether writing or reading meets it first is
            # chance, and httpx wraps it only when it reads.
            with pytest.raises((httpx.TransportError, ssl.SSLError)):
                await client.get(f"{address}/stats/prometheus")


def test_metrics_without_certificates_are_refused(tmp_path: Path) -> None:
    said = refusal(tmp_path, ESD_METRICS_LISTEN="127.0.0.1:9901")
    assert "setting ESD_METRICS_CERTIFICATES: Field required when ESD_METRICS_LISTEN is set" in said
