"""Settings from the environment: every variable starts with `ESD_`, and a wrong value stops the process by name.
An empty variable is one that is not set.

ESD_SETTINGS_DIR may name a folder with a file per setting, as Kubernetes mounts a Secret: a file `esd_database_url`
there is ESD_DATABASE_URL, unless the environment has it too.
"""

from __future__ import annotations

import json
import os
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import Field, Json, PlainValidator, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.common.process import refuse

URL = r"^https?://[^/?#\s]+"
SOME_URLS = ["https://esd.example.org"]  # what a wrong one is answered with
HOST_AND_PORT = r"(\[[0-9a-fA-F:.]+\]|[^:\s,]+):\d{1,5}"
_IPV4_AND_PORT = r"\d{1,3}(\.\d{1,3}){3}:\d{1,5}"
# `host:port` of another service. Of replicas, a name that stands for all of them, or the IPv4 addresses with commas
# between them: a gRPC channel (clients.py) takes no list of names.
Address = Annotated[
    str,
    Field(
        pattern=f"^({HOST_AND_PORT}|{_IPV4_AND_PORT}(,{_IPV4_AND_PORT})+)$",
        examples=["identity:9000 or, for replicas, 10.0.0.1:9000,10.0.0.2:9000"],
    ),
]

# As JSON. (pydantic's own union of the two kinds answers a wrong one with two errors.)
Networks = Annotated[
    Json[list[Annotated[IPv4Network | IPv6Network, PlainValidator(ip_network)]]],
    Field(validate_default=False, examples=['["10.0.0.0/8"]']),
]


class FromEnvironment(BaseSettings):
    """Values that the environment has under one prefix."""

    model_config = SettingsConfigDict(env_prefix="ESD_", env_ignore_empty=True, extra="ignore", frozen=True)


class Settings(FromEnvironment):
    """The base of every process's settings."""

    log_level: str = Field("info", pattern="^(debug|info|warning|error)$")
    log_format: str = Field("console", pattern="^(console|json)$")


class BlobSettings(FromEnvironment):
    """Where the bucket is. Services talk to `endpoint_url`; presigned URLs are signed for `public_url`."""

    model_config = SettingsConfigDict(env_prefix="ESD_S3_")

    bucket: str
    region: str = "us-east-1"
    endpoint_url: str | None = None
    public_url: str | None = Field(None, pattern=URL, examples=SOME_URLS)
    access_key: str | None = None
    secret_key_file: Path | None = Field(None, validate_default=True)

    @field_validator("secret_key_file")
    @classmethod
    def _both_or_neither(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if (value is None) != (info.data.get("access_key") is None):
            raise ValueError("it and ESD_S3_ACCESS_KEY belong together: set both or neither")
        return value


class ServiceSettings(Settings):
    """What each service needs. `listen` is `host:port`. A service that asks others has their addresses too."""

    listen: str = "127.0.0.1:0"
    database_url: str
    secret_file: Path
    verifying_key_file: Path


class AuditedSettings(ServiceSettings):
    """Of a service that writes an audit: its key is of this service alone, and never in the database."""

    audit_key_file: Path


SETTINGS_DIR = "ESD_SETTINGS_DIR"
S = TypeVar("S", bound=BaseSettings)


def load(settings: type[S]) -> S:
    """Reads the environment, and the folder that ESD_SETTINGS_DIR names.

    Raises:
        SystemExit: a value is missing or wrong; each variable is named, with its value and what is allowed (`refuse`).
    """
    folder = os.environ.get(SETTINGS_DIR) or None
    if folder is not None and not os.path.isdir(folder):
        refuse(f"setting {SETTINGS_DIR}: {folder} is not a folder")
    try:
        return settings(_secrets_dir=folder)
    except ValidationError as error:
        refuse("\n".join(_problem(settings, problem) for problem in error.errors()))


def read_secret(path: Path) -> str:
    """The content of a secret's file, without the newline at its end.

    Raises:
        SystemExit: it cannot be read.
    """
    try:
        return path.read_text().strip()
    except OSError as error:
        refuse(f"the file {path} cannot be read: {error.strerror}")
    except UnicodeDecodeError:
        refuse(f"the file {path} holds no text")


def _problem(settings: type[BaseSettings], problem: ErrorDetails) -> str:
    field_name, *within = problem["loc"]
    name = settings.model_config.get("env_prefix", "") + str(field_name).upper()
    name += "".join(f"[{json.dumps(part)}]" for part in within)
    given = "" if problem["type"] == "missing" else f" (given: {problem['input']!r})"
    what = problem["msg"].removeprefix("Value error, ")  # pydantic's own words before ours
    field = settings.model_fields.get(str(field_name))
    if problem["type"] in {"string_pattern_mismatch", "json_invalid"} and field is not None and field.examples:
        what = f"a value such as {field.examples[0]} is wanted"  # which a pattern does not say to everybody
    return f"setting {name}: {what}{given}"
