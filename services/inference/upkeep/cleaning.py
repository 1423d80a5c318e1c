"""Removes what is old: jobs after their retention, and the objects that nobody may see any more."""

from __future__ import annotations

import asyncio

import structlog

from services.common.blobs import Blobs
from services.common.errors import Unavailable
from services.common.leftovers import LeftoverStore, Sweeper
from services.inference.store import JobStore

log = structlog.get_logger()


class Cleaner(Sweeper):
    """Empties the prefixes that the stores have left behind; `retention_days` 0 keeps jobs for ever.

    Two replicas may do so at once.
    """

    def __init__(
        self, store: LeftoverStore, jobs: JobStore, blobs: Blobs, sweep_seconds: float, retention_days: float = 0.0
    ) -> None:
        super().__init__(store, blobs)
        self._jobs = jobs
        self._retention_days = retention_days
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
