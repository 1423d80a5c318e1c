"""What Swift's proxy remembers of accounts and containers: the part of a memcached that it uses, for its one process.

Without it every request for an object first asks the account and container servers whether theirs exists, which takes
as long as the rest of the request. The proxy clears what it changes; nobody else changes anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from time import monotonic
from typing import Any

_MAX_ENTRIES = 10_000  # names come from requests that are not authenticated yet

App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class ProcessCache:
    """Values by key, for some seconds, as the proxy asks a `MemcacheRing` for them."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[str, float]] = {}  # JSON and its end on the monotonic clock

    def get(self, key: str, raise_on_error: bool = False) -> Any:
        """A copy of the value, or None."""
        text, end = self._entries.get(key, ("null", 0.0))
        return json.loads(text) if monotonic() < end else None

    def set(self, key: str, value: Any, time: float = 0, raise_on_error: bool = False) -> None:
        """Keeps a copy of the value for `time` seconds."""
        if len(self._entries) >= _MAX_ENTRIES:
            self._entries.clear()
        self._entries[key] = json.dumps(value), monotonic() + time

    def delete(self, key: str) -> None:
        """Forgets the value."""
        self._entries.pop(key, None)


def filter_factory(global_conf: dict[str, str], **local_conf: str) -> Callable[[App], App]:
    """The filter of Swift's pipeline that gives each request the cache."""
    cache = ProcessCache()

    def make_filter(app: App) -> App:
        def run(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            environ["swift.cache"] = cache
            return app(environ, start_response)

        return run

    return make_filter
