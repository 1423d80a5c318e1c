"""A job's payload on its way from the client to the queue: checked by `payloads`, and frozen as bytes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from services.common import payloads
from services.common.errors import InvalidArgument
from services.common.structs import most_values

MAX_BYTES = 64 * 1024 * 1024
# Each becomes some dozen times as large as it is written, unless it is a text as pictures are. Four prompts may look
# like a fifth of it.
_MAX_VALUES = 200_000


@dataclass(frozen=True)
class CheckedPayload:
    """A payload ready to run: as plain values and as bytes, with what the queue needs to know of it."""

    request: payloads.Payload
    fields: dict[str, Any]
    encoded: bytes
    num_images: int
    cost_seconds: float

    @property
    def sha256(self) -> str:
        """Of the encoded form, in hex."""
        return hashlib.sha256(self.encoded).hexdigest()


def check_json(text: str) -> None:
    """Checks that a text is JSON as Python reads it, `Infinity` and `NaN` included.

    Raises:
        InvalidArgument: it is not, or has too many values.
    """
    _check_values(text)
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidArgument("payload_string must be valid json string") from None


def check_payload(content: bytes | str, task_type: str, job_id: str) -> CheckedPayload:
    """Parses and checks a payload.

    Raises:
        InvalidArgument: the message names each wrong field with its value and what is possible.
    """
    _check_values(content)
    request = payloads.check(task_type, payloads.parse(content), job_id)
    fields = request.model_dump()
    encoded = json.dumps(fields, ensure_ascii=False).encode()
    return CheckedPayload(request, fields, encoded, request.num_images, request.cost_seconds)


def _check_values(content: bytes | str) -> None:
    if most_values(content) > _MAX_VALUES:
        raise InvalidArgument(f"the payload has more than {_MAX_VALUES} commas and opening brackets")
