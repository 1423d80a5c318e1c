"""The settings of the models service."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network

from pydantic import Field

from services.common.blobs import GIB
from services.common.settings import AuditedSettings


class ModelsSettings(AuditedSettings):
    """What models needs beside what every service does.

    Imports may come from public addresses, and from `import_allowed_networks` (a JSON list such as `["10.0.0.0/8"]`).
    """

    import_allowed_networks: list[IPv4Network | IPv6Network] = Field(default_factory=list)
    import_max_bytes: int = Field(100 * GIB, ge=1)
    import_max_hours: float = Field(24, gt=0)
    upload_max_hours: float = Field(48, gt=0)
