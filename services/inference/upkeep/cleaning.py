"""Removes what is old: jobs after their retention, and the objects that nobody may see any more."""

from __future__ import annotations

import asyncio

import structlog

from services.common.blobs import Blobs
from services.common.errors import Unavailable
from services.inference.store import JobStore
from services.inference.upkeep.leftover_store import LeftoverStore

log = structlog.get_logger()

_AT_ONCE = 100


class Cleaner:
    """Empties the prefixes that the stores have left behind; `retention_days` 0 keeps jobs for ever.

    Two replicas may do so at once.
    """

    def __init__(
        self, store: LeftoverStore, jobs: JobStore, blobs: Blobs, sweep_seconds: float, retention_days: float = 0.0
    ) -> None:
        self._store = store
        self._jobs = jobs
        self._retention_days = retention_days
        self._blobs = blobs
        self._sweep_seconds = sweep_seconds

    async def run(self) -> None:
        """Removes what is due, until cancelled."""
        while True:
            try:
                await self._jobs.forget()
                while self._retention_days and (num_deleted := await self._jobs.delete_old(self._retention_days)):
                    log.info("old jobs removed", num_jobs=num_deleted)
                await self.sweep()
            except Unavailable as error:
                log.warning("the cleaner waits", reason=str(error))
            await asyncio.sleep(self._sweep_seconds)  # due by the clock, so nothing tells

    async def sweep(self) -> None:
        """Removes everything that is due.

        Raises:
            Unavailable: the store or the database does not answer; the rest stays due.
        """
        while found := await self._store.due(_AT_ONCE):
            for leftover in found:
                await self._blobs.delete_prefix(leftover.prefix)
                await self._store.swept(leftover.prefix, leftover.due_time)

    async def discard(self, prefixes: list[str]) -> None:
        """Notes prefixes of a job that there is not, and removes what is below them."""
        await self._store.add(prefixes)
        await self.remove(prefixes)

    async def remove(self, prefixes: list[str]) -> None:
        """Removes what is below prefixes that are noted already; what cannot be removed now is at their next turn."""
        try:
            for prefix in prefixes:
                await self._blobs.delete_prefix(prefix)
        except Unavailable as error:
            log.warning("objects wait to be removed", prefixes=prefixes, reason=str(error))
