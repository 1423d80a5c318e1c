"""What every payload is: checked, frozen, and with what the queue needs to know of it."""

from __future__ import annotations

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
