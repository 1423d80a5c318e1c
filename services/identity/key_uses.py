"""Notes when keys were last used, without making a request wait.

`note` is a look into a dictionary; a task of its own writes, at most once per key and minute.
"""

from __future__ import annotations

import asyncio
import time
from uuid import UUID

import structlog

from services.common.errors import Unavailable
from services.identity.store import IdentityStore

log = structlog.get_logger()

_NOTED_SECONDS = 60.0
_MAX_NOTED = 10_000


class KeyUses:
    """Uses that are on their way to the table. `write` runs beside the server until it is cancelled."""

    def __init__(self, store: IdentityStore) -> None:
        self._store = store
        self._noted: dict[UUID, float] = {}
        self._waiting: set[UUID] = set()
        self._wake = asyncio.Event()

    def note(self, key_id: UUID) -> None:
        """Says that the key is used now."""
        now = time.monotonic()
        if now - self._noted.get(key_id, -_NOTED_SECONDS) < _NOTED_SECONDS:
            return
        if len(self._noted) >= _MAX_NOTED:
            self._noted.clear()
        self._noted[key_id] = now
        self._waiting.add(key_id)
        self._wake.set()

    async def write(self) -> None:
        """Writes what is noted, as it comes. While the database is down uses are forgotten: they are no bookkeeping."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            key_ids, self._waiting = self._waiting, set()
            try:
                await self._store.save_key_uses(sorted(key_ids))
            except Unavailable as error:
                log.warning("the last use of keys is not written", keys=len(key_ids), error=str(error))
