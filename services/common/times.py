"""Times as text, in the one form that the API has for them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import overload

_FORMAT = "%Y-%m-%d %H:%M:%S.%f"


@overload
def time_text(time: datetime) -> str: ...
@overload
def time_text(time: None) -> None: ...
def time_text(time: datetime | None) -> str | None:
    """`YYYY-MM-DD HH:MM:SS.ffffff` in UTC: always six digits, clients parse it so. None stays None."""
    return None if time is None else time.astimezone(UTC).strftime(_FORMAT)


def parse_time(text: str) -> datetime:
    """The time, in UTC, that `time_text` made the text of.

    Raises:
        ValueError: it is none.
    """
    return datetime.strptime(text, _FORMAT).replace(tzinfo=UTC)


def read_time(text: str) -> datetime:
    """The time that a client means: any ISO 8601 date or time; UTC unless it names its zone.

    Raises:
        ValueError: it is none.
    """
    time = datetime.fromisoformat(text.strip())
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)
