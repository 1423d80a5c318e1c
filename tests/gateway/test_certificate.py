"""The certificate that clients see: replaced files are taken without a restart, unusable ones stop the start."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import pytest

from tests.gateway.conftest import Gateway, Seen, running_gateway
from tests.gateway.test_start import make_certificate, refusal


async def shown(gateway: Gateway) -> str:
    """The certificate of a new connection, as PEM."""
    host, port = gateway.address.split(":")
    return await asyncio.to_thread(ssl.get_server_certificate, (host, int(port)))


async def until_shown(gateway: Gateway, certificate: str) -> None:
    """Returns when new connections have this certificate."""
    while await shown(gateway) != certificate:  # noqa: ASYNC110 - of Envoy
        await asyncio.sleep(0.05)


def mount(volume: Path, version: str) -> str:
    """Puts a new certificate into a folder as Kubernetes updates a Secret there; returns the certificate."""
    (volume / version).mkdir(parents=True)
    for file, name in zip(make_certificate(volume / version), ("tls.crt", "tls.key"), strict=True):
        file.rename(volume / version / name)
        if not (volume / name).is_symlink():
            (volume / name).symlink_to(f"..data/{name}")
    (volume / "..data_tmp").symlink_to(version)
    (volume / "..data_tmp").rename(volume / "..data")
    return (volume / "tls.crt").read_text()


def tls(certificate: Path, key: Path) -> dict[str, str]:
    return {"ESD_TLS_CERT_FILE": str(certificate), "ESD_TLS_KEY_FILE": str(key)}


async def test_a_secret_that_kubernetes_replaces_is_taken_and_connections_stay(
    services: tuple[str, Seen], tmp_path: Path
) -> None:
    volume = tmp_path / "volume"
    first = mount(volume, "..2026_01_01")
    async with running_gateway(tmp_path, services[0], **tls(volume / "tls.crt", volume / "tls.key")) as gateway:
        assert await shown(gateway) == first
        host, port = gateway.address.split(":")
        trust = ssl.create_default_context(cafile=str(volume / "tls.crt"))
        reader, writer = await asyncio.open_connection(host, int(port), ssl=trust, server_hostname="localhost")
        await until_shown(gateway, mount(volume, "..2026_03_01"))
        writer.write(b"OPTIONS / HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 204")
        writer.close()
        await until_shown(gateway, mount(volume, "..2026_05_01"))


async def test_files_that_are_renamed_one_by_one_are_taken_when_they_belong_together(
    services: tuple[str, Seen], tmp_path: Path
) -> None:
    certificate, key = make_certificate(tmp_path)
    (tmp_path / "new").mkdir()
    new_certificate, new_key = make_certificate(tmp_path / "new")
    old, new = certificate.read_text(), new_certificate.read_text()
    async with running_gateway(tmp_path, services[0], **tls(certificate, key)) as gateway:
        new_key.rename(key)
        assert await shown(gateway) == old
        new_certificate.rename(certificate)
        await until_shown(gateway, new)


@pytest.mark.slow
async def test_who_never_begins_with_tls_is_let_go(services: tuple[str, Seen], tmp_path: Path) -> None:
    async with running_gateway(tmp_path, services[0], **tls(*make_certificate(tmp_path))) as gateway:
        host, port = gateway.address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        assert await reader.read() == b""  # its end
        writer.close()


@pytest.mark.parametrize("unusable", ["nothing", "text", "the key of another"])
def test_a_certificate_that_cannot_be_used_stops_the_start(tmp_path: Path, unusable: str) -> None:
    certificate, key = make_certificate(tmp_path)
    if unusable == "nothing":
        key.unlink()
    elif unusable == "text":
        certificate.write_text("not PEM")
    else:
        (tmp_path / "another").mkdir()
        key = make_certificate(tmp_path / "another")[1]
    said = refusal(tmp_path, **tls(certificate, key))
    assert f"ESD_TLS_CERT_FILE={certificate} and ESD_TLS_KEY_FILE={key} are no certificate and its key" in said
