"""The settings of the models service."""

from __future__ import annotations

from pydantic import Field

from services.common.blobs import GIB
from services.common.settings import Address, AuditedSettings, Networks
from services.models.domain import LOOK_MAX_BYTES


class ModelsSettings(AuditedSettings):
    """What models needs beside what every service does.

    Imports may come from public addresses, and from `import_allowed_networks` (a JSON list such as `["10.0.0.0/8"]`).
    A user may have `max_imports_per_user` that have not ended (0: any number).
    A renamed file's object stays under its old key for `renamed_keep_hours` too, for jobs that were queued with it.
    Uploaded files of more than `look_max_bytes` are looked at after their client was answered.
    """

    identity_address: Address
    import_allowed_networks: Networks = Field(default=[])
    import_max_bytes: int = Field(100 * GIB, ge=1)
    import_max_hours: float = Field(24, gt=0)
    max_imports_per_user: int = Field(100, ge=0)
    upload_max_hours: float = Field(48, gt=0)
    renamed_keep_hours: float = Field(168, ge=0)
    look_max_bytes: int = Field(LOOK_MAX_BYTES, ge=0)
