"""What every payload is: checked, frozen, and with what the queue needs to know of it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict


class Payload(BaseModel):
    """One job's request."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

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
