"""Lists in pages: how many rows a page has, and the key that continues after its last row.

A key is opaque to clients: base64 of a JSON object with the row's id and time, under the names that the original has.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from datetime import datetime
from typing import Any, NamedTuple, TypeVar, overload
from uuid import UUID

from services.common.errors import InvalidArgument
from services.common.times import parse_time, time_text

DEFAULT_LIMIT = 10
MAX_LIMIT = 1000
T = TypeVar("T")


class KeyNames(NamedTuple):
    """What a list calls its rows' id and time in its keys."""

    id: str
    time: str


def parse_limit(text: str) -> int:
    """How many rows a page has: 10 by default; 0 and below ask for all, which is as many as a page can have.

    Raises:
        InvalidArgument: it is no whole number.
    """
    try:
        limit = int(text or DEFAULT_LIMIT)
    except ValueError:
        raise InvalidArgument(f'limit "{text}" is not a number') from None
    return min(limit, MAX_LIMIT) if limit > 0 else MAX_LIMIT


def make_key(names: KeyNames, row_id: UUID | str, time: datetime, **others: str) -> str:
    """The key of the page after this row; `others` are there for those who look into it."""
    fields = {names.id: str(row_id), **others, names.time: time_text(time)}
    return base64.urlsafe_b64encode(json.dumps(fields).encode()).decode()


@overload
def parse_key(names: KeyNames, key: str) -> tuple[datetime, UUID] | None: ...
@overload
def parse_key(names: KeyNames, key: str, parse_id: Callable[[str], T]) -> tuple[datetime, T] | None: ...
def parse_key(names: KeyNames, key: str, parse_id: Callable[[str], Any] = UUID) -> tuple[datetime, Any] | None:
    """The time and id of the row that a page comes after; None without a key. `parse_id` raises ValueError for what is
    no id.

    Raises:
        InvalidArgument: it is no key of such a list.
    """
    if not key:
        return None
    try:
        fields = json.loads(base64.b64decode(key, altchars=b"-_", validate=True))
        return parse_time(fields[names.time]), parse_id(fields[names.id])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InvalidArgument(f'exclusive_start_key "{key}" is malformed') from None
