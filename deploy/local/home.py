"""Owns ESD_HOME: where data lies on disk, and the secrets that are generated at the first start and never printed.

secrets/    0700; one file per secret, 0600
postgres/   the database cluster (owned by the user PostgreSQL runs as)
swift/      the object store
worker/     worker secrets, logs and model cache, kept by the endpoints service
run/        0700; the lock and the state of the running stack, and whom its workers trust
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

from deploy.local.files import write_durably
from services.identity.keys import new_api_key

SERVICES = ("identity", "models", "endpoints", "inference", "training")
AUDITED = ("identity", "models", "endpoints")
S3_ACCESS_KEY = "esd:esd"  # Swift's tempauth wants account:user
S3_BUCKET = "esd"
S3_REGION = "us-east-1"


class CannotRunError(RuntimeError):
    """Why a stack cannot run here; the message is for its user."""


class HomeDamagedError(CannotRunError):
    """A file of ESD_HOME is not what was written; the message names it and says what can be done."""


def default_home() -> Path:
    """Returns ESD_HOME, else ~/.esd; for root /var/lib/esd, where PostgreSQL's user can get."""
    if home := os.environ.get("ESD_HOME"):
        return Path(home).expanduser().resolve()
    return Path("/var/lib/esd") if os.geteuid() == 0 else Path.home() / ".esd"


def run_folder(home: Path) -> Path:
    """Returns ESD_HOME/run, made if it is not there. Who takes the lock in it first may make secrets."""
    # As root other users may pass through (not list), because PostgreSQL runs as one of them.
    if not home.exists():
        home.mkdir(parents=True)
        home.chmod(0o711 if os.geteuid() == 0 else 0o700)  # whatever the umask says
    return private_folder(home / "run")


def private_folder(folder: Path) -> Path:
    """Returns the folder, made if it is not there, and closed to other users."""
    folder.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(0o700)
    return folder


class Home:
    """The folder of one stack. Opening it makes what is missing and leaves what is there."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.run = run_folder(self.path)
        self.secrets = private_folder(self.path / "secrets")
        self.worker = private_folder(self.path / "worker")
        self.swift = private_folder(self.path / "swift")
        self.postgres = self.path / "postgres"
        self.trust_file = self.run / "trusted.pem"  # certificates that workers go by, where the gateway has one

        self.api_key_file = self.kept("api-key", new_api_key)
        self.password_key_file = self.kept("password-key", lambda: Fernet.generate_key().decode())
        self.s3_secret_key_file = self.kept("s3-secret-key", _random)
        self.signing_key_file = self.kept("signing-key.pem", _new_signing_key)
        self.verifying_key_file = self._derived("verifying-key.pem", _public_half(self.signing_key_file.read_bytes()))
        hashes = {name: hashlib.sha256(self.secret(name).encode()).hexdigest() for name in (*SERVICES, "gateway")}
        self.secret_hashes_file = self._derived("secret-hashes.json", json.dumps(hashes, indent=2))

    def secret_file(self, name: str) -> Path:
        """Returns the file with the secret of a service or of the gateway."""
        return self.kept(f"{name}.secret", _random)

    def secret(self, name: str) -> str:
        """Returns the secret of a service or of the gateway."""
        return self.secret_file(name).read_text()

    def database_password(self, role: str) -> str:
        """Returns the password of a PostgreSQL role."""
        return self.kept(self.database_password_file(role).name, _random).read_text()

    def database_password_file(self, role: str) -> Path:
        """Where that password is, or will be."""
        return self.secrets / f"postgres-{role}.password"

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

    def kept(self, name: str, make: Callable[[], str]) -> Path:
        """The file of a secret, made if it is not there.

        Raises:
            HomeDamagedError: it is empty.
        """
        file = self.secrets / name
        if not file.exists():
            write_durably(file, make())
        elif not file.stat().st_size:
            raise HomeDamagedError(f"{file} is empty: put a copy of it back; what it opens knows no other secret")
        return file

    def _derived(self, name: str, text: str) -> Path:
        """A file that follows from secrets, written anew where they have changed."""
        file = self.secrets / name
        if not file.exists() or file.read_text() != text:
            write_durably(file, text)
        return file


def _random() -> str:
    return secrets.token_hex(32)


def _new_signing_key() -> str:
    return Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def _public_half(signing_key: bytes) -> str:
    public = load_pem_private_key(signing_key, password=None).public_key()
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
