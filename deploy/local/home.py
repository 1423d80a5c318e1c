"""Owns ESD_HOME: where data lies on disk, and the secrets that are generated at the first start and never printed.

secrets/    0700; one file per secret, 0600
postgres/   the database cluster (owned by the user PostgreSQL runs as)
swift/      the object store
worker/     worker secrets, logs and model cache, kept by the endpoints service
run/        0700; the lock and the state of the running stack
"""

import hashlib
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from cryptography.fernet import Fernet
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from services.identity.keys import new_api_key

SERVICES = ("identity", "models", "endpoints", "inference", "training")
AUDITED = ("identity", "models", "endpoints")
S3_ACCESS_KEY = "esd:esd"  # Swift's tempauth wants account:user
S3_BUCKET = "esd"
S3_REGION = "us-east-1"


def default_home() -> Path:
    """Returns ESD_HOME, else ~/.esd; for root /var/lib/esd, where PostgreSQL's user can get."""
    if home := os.environ.get("ESD_HOME"):
        return Path(home).expanduser().resolve()
    return Path("/var/lib/esd") if os.geteuid() == 0 else Path.home() / ".esd"


def run_folder(home: Path) -> Path:
    """Returns ESD_HOME/run, made if it is not there. Who takes the lock in it first may make secrets."""
    # As root other users may pass through (not list), because PostgreSQL runs as one of them.
    home.mkdir(mode=0o711 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True)
    folder = home / "run"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


class Home:
    """The folder of one stack. Opening it makes what is missing and leaves what is there."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.run = run_folder(self.path)
        self.secrets = self._private_folder("secrets")
        self.worker = self._private_folder("worker")
        self.swift = self._private_folder("swift")
        self.postgres = self.path / "postgres"

        self.api_key_file = self.kept("api-key", new_api_key)
        self.password_key_file = self.kept("password-key", lambda: Fernet.generate_key().decode())
        self.s3_secret_key_file = self.kept("s3-secret-key", _random)
        self.signing_key_file = self.kept("signing-key.pem", _new_signing_key)
        self.verifying_key_file = self.kept(
            "verifying-key.pem", lambda: _public_half(self.signing_key_file.read_bytes())
        )
        hashes = {name: hashlib.sha256(self.secret(name).encode()).hexdigest() for name in (*SERVICES, "gateway")}
        self.secret_hashes_file = self.kept("secret-hashes.json", lambda: json.dumps(hashes, indent=2))

    def secret_file(self, name: str) -> Path:
        """Returns the file with the secret of a service or of the gateway."""
        return self.kept(f"{name}.secret", _random)

    def secret(self, name: str) -> str:
        """Returns the secret of a service or of the gateway."""
        return self.secret_file(name).read_text()

    def database_password(self, role: str) -> str:
        """Returns the password of a PostgreSQL role."""
        return self.kept(f"postgres-{role}.password", _random).read_text()

    def audit_key_file(self, service: str) -> Path:
        """Returns the file with the key of a service's audit."""
        return self.kept(f"{service}.audit-key", _random)

    @property
    def api_key(self) -> str:
        """The first API key."""
        return self.api_key_file.read_text()

    @property
    def s3_secret_key(self) -> str:
        """The secret key that belongs to S3_ACCESS_KEY."""
        return self.s3_secret_key_file.read_text()

    def _private_folder(self, name: str) -> Path:
        folder = self.path / name
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    def kept(self, name: str, make: Callable[[], str]) -> Path:
        """The file of a secret, made if it is not there."""
        file = self.secrets / name
        if not file.exists():
            # Written aside and renamed: a start that is cut off leaves no half secret.
            part = file.with_name(f".{name}.{os.getpid()}")
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as output:
                output.write(make())
            part.rename(file)
        return file


def _random() -> str:
    return secrets.token_hex(32)


def _new_signing_key() -> str:
    return Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def _public_half(signing_key: bytes) -> str:
    public = load_pem_private_key(signing_key, password=None).public_key()
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
