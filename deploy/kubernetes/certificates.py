"""Makes the certificates by which a server of ours and its one client know each other: an authority, and one for each.

The authority signs these two and its key is kept nowhere; who loses a certificate makes all three anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_VALID = timedelta(days=3650)


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as PEM."""

    certificate: bytes
    key: bytes


@dataclass(frozen=True)
class Certificates:
    """What each side has, and the authority that both trust."""

    authority: bytes
    server: Pair
    client: Pair

    @property
    def server_files(self) -> dict[str, bytes]:
        """What the server's Secret has, by the names of Kubernetes."""
        return _files(self.server, self.authority)

    @property
    def client_files(self) -> dict[str, bytes]:
        """What the client's Secret has."""
        return _files(self.client, self.authority)


def make_certificates(server_names: list[str], client: str) -> Certificates:
    """New ones, for a server of these names and a client of that one."""
    key = generate_private_key(SECP256R1())
    name = _name("esd")
    authority = (
        _builder(name, name, key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )

    def issue(common_name: str, use: x509.ObjectIdentifier, names: list[str]) -> Pair:
        own = generate_private_key(SECP256R1())
        builder = (
            _builder(_name(common_name), name, own)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(each) for each in names]), critical=False)
        )
        return Pair(_pem(builder.sign(key, hashes.SHA256())), _key_pem(own))

    return Certificates(
        _pem(authority),
        issue(server_names[0], ExtendedKeyUsageOID.SERVER_AUTH, server_names),
        issue(client, ExtendedKeyUsageOID.CLIENT_AUTH, [client]),
    )


def _files(pair: Pair, authority: bytes) -> dict[str, bytes]:
    return {"tls.crt": pair.certificate, "tls.key": pair.key, "ca.crt": authority}


def _builder(subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))  # clocks of machines differ
        .not_valid_after(now + _VALID)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def _key_pem(key: EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
