"""The settings of the identity service, and the secrets that its files hold."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from services.common.process import refuse
from services.common.settings import AuditedSettings, read_secret

_SHA256 = re.compile("[0-9a-f]{64}")


class IdentitySettings(AuditedSettings):
    """What identity needs beside what every service does.

    Without `allow_initial_users` a WebUI client's `initial` user needs the permission like any other (contract 3.6).
    """

    signing_key_file: Path
    secret_hashes_file: Path
    api_key_file: Path
    password_key_file: Path
    allow_initial_users: bool = True


@dataclass(frozen=True)
class SecretHashes:
    """The SHA-256 of the gateway's secret, and of each service's secret with the service's name."""

    gateway: str
    services: dict[str, str]


def read_secret_hashes(path: Path) -> SecretHashes:
    """Reads `{"gateway": sha256, "models": sha256, …}`.

    Raises:
        SystemExit: the file is not of that form; the message names it.
    """
    try:
        hashes = json.loads(read_secret(path))
        gateway = hashes.pop("gateway")
        wrong = [name for name, value in {"gateway": gateway, **hashes}.items() if not _SHA256.fullmatch(value)]
    except (ValueError, TypeError, AttributeError, KeyError):
        refuse(f'setting ESD_SECRET_HASHES_FILE: {path} is not a JSON object with "gateway"')
    if wrong:
        refuse(f"setting ESD_SECRET_HASHES_FILE: {path}: not a SHA-256 in hexadecimal: {', '.join(wrong)}")
    return SecretHashes(gateway, {value: name for name, value in hashes.items()})
