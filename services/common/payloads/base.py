"""What every payload is: checked, frozen, and with what the queue needs to know of it."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Payload(BaseModel):
    """One job's request."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _whole_numbers(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Where a whole number is wanted, what is behind the point does not count, as in A1111."""
        whole = {name for name, field in cls.model_fields.items() if field.annotation is int}
        cut = {
            name: int(value) for name in whole if isinstance(value := fields.get(name), float) and math.isfinite(value)
        }
        return fields | cut

    @property
    def num_images(self) -> int:
        """How many pictures the job makes."""
        raise NotImplementedError

    @property
    def upscalers(self) -> list[tuple[str, str]]:
        """The names of the upscalers that are models, each behind its field."""
        return []

    @property
    def cost_seconds(self) -> float:
        """The job's estimated time, up to a constant factor that is the same for all payloads."""
        raise NotImplementedError

    def echo(self) -> dict[str, Any]:
        """The request as it is shown to its owner."""
        return self.model_dump()

    def digests(self) -> dict[str, str]:
        """The SHA-256 of each field that `echo` does not show whole: the client's own pictures."""
        shown = self.echo()
        hidden = {name: value for name, value in self.model_dump().items() if value != shown.get(name)}
        return {name: hashlib.sha256(json.dumps(value).encode()).hexdigest() for name, value in hidden.items()}
