"""How the gateway starts: TLS, what it refuses to do, and where its secret lies."""

from __future__ import annotations

import datetime
import socket
import ssl
import stat
import subprocess
import sys
from pathlib import Path

import grpc
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from esd.identity.v1 import identity_pb2, identity_pb2_grpc
from services.common.process import EXIT_WRONG_SETTING
from tests.gateway.conftest import KEY, ROOT, Gateway, Seen, running_gateway


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for localhost, signed by itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    certificate_file, key_file = folder / "certificate.pem", folder / "key.pem"
    certificate_file.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    key_file.write_bytes(key.private_bytes(*pem))
    return certificate_file, key_file


async def test_with_a_certificate_both_rest_and_grpc_are_encrypted(services: tuple[str, Seen], tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    tls = {"ESD_TLS_CERT_FILE": str(certificate), "ESD_TLS_KEY_FILE": str(key)}
    async with running_gateway(tmp_path, services[0], **tls) as gateway:
        port = gateway.address.split(":")[1]
        trust = ssl.create_default_context(cafile=str(certificate))
        async with httpx.AsyncClient(verify=trust, headers={"x-api-key": KEY}) as client:
            assert (await client.get(f"https://localhost:{port}/ping")).json()["message"] == "pong"
        credentials = grpc.ssl_channel_credentials(certificate.read_bytes())
        async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel:
            stub = identity_pb2_grpc.IdentityServiceStub(channel)
            assert await stub.Ping(identity_pb2.PingRequest(), metadata=(("x-api-key", KEY),)) is not None


async def test_a_folder_that_the_gateway_made_for_itself_is_gone_when_it_ends(
    services: tuple[str, Seen], tmp_path: Path
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    async with running_gateway(tmp_path, services[0], ESD_RUN_DIR="", TMPDIR=str(temporary)) as gateway:
        [folder] = temporary.iterdir()
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        gateway.process.terminate()
        assert await gateway.process.wait() == 0
    assert not list(temporary.iterdir())


async def test_the_rendered_file_is_for_its_owner_only(services: tuple[str, Seen], tmp_path: Path) -> None:
    async with running_gateway(tmp_path, services[0]):
        assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700
        assert stat.S_IMODE((tmp_path / "run" / "envoy.yaml").stat().st_mode) == 0o600


async def test_nobody_else_listens_on_its_ports(gateway: Gateway) -> None:
    for address in (gateway.address, gateway.webui_address):
        host, port = address.split(":")
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            with pytest.raises(OSError, match="in use"):
                other.bind((host, int(port)))


def refusal(tmp_path: Path, **settings: str) -> str:
    """What the gateway says when it will not start with these settings."""
    secret = tmp_path / "secret"
    secret.write_text("s")
    names = ("IDENTITY", "MODELS", "ENDPOINTS", "INFERENCE", "TRAINING")
    environment = {f"ESD_{name}_ADDRESS": "127.0.0.1:1" for name in names}
    environment |= {"ESD_SECRET_FILE": str(secret), **settings}
    done = subprocess.run(
        [sys.executable, "-m", "gateway"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == EXIT_WRONG_SETTING
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize("listen", ["0.0.0.0:8080", "[::]:8080", "192.0.2.1:8080", "gateway.example:8080"])
def test_it_does_not_send_keys_in_clear_over_a_network(tmp_path: Path, listen: str) -> None:
    said = refusal(tmp_path, ESD_LISTEN=listen)
    assert listen in said
    assert "ESD_TLS_CERT_FILE" in said
    assert "ESD_INSECURE=true" in said


def test_a_certificate_without_its_key_is_refused(tmp_path: Path) -> None:
    assert "ESD_TLS_KEY_FILE" in refusal(tmp_path, ESD_TLS_CERT_FILE="/certificate.pem")


@pytest.mark.parametrize(
    ("name", "value"),
    [("ESD_LISTEN", "8080"), ("ESD_BASE_PATH", "prod"), ("ESD_S3_BUCKET", "a/b"), ("ESD_WEBUI_PORT", "x")],
)
def test_a_wrong_value_is_named(tmp_path: Path, name: str, value: str) -> None:
    said = refusal(tmp_path, **{name: value})
    assert name in said
    assert value in said


def test_a_missing_secret_file_is_named(tmp_path: Path) -> None:
    assert "/nowhere/secret" in refusal(tmp_path, ESD_SECRET_FILE="/nowhere/secret")
