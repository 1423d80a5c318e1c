"""What becomes of the queued jobs of an endpoint that went away: they move to another one or fail with the reason."""

from __future__ import annotations

import asyncio
import random
from uuid import UUID

import structlog

from services.common.errors import EsdError, Unavailable
from services.common.viewer import Viewer
from services.inference.peers import Endpoint, Peers
from services.inference.queue.pool_store import PoolStore
from services.inference.rows import Job

log = structlog.get_logger()


class RetiredEndpoints:
    """Endpoints that went away, and the jobs that are stranded in their queues."""

    def __init__(self, store: PoolStore, peers: Peers) -> None:
        self._store = store
        self._peers = peers
        self._at_it = asyncio.Lock()

    async def retire(self, endpoint_id: UUID, reason: str) -> tuple[int, int]:
        """Moves the queued jobs of an endpoint elsewhere or fails them; answers how many each.

        Jobs that come back to this queue later, from a worker that stops, go the same way at the next sweep.
        """
        moved = failed = 0
        async with self._at_it:
            await self._store.retire(endpoint_id, reason)
            while stranded := await self._store.stranded(endpoint_id):
                usable = _UsableEndpoints(self._peers)
                for job, why in stranded:
                    others = [found for found in await usable.of(job) if found.id != job.endpoint_id]
                    if await self._settle(job, why, others):
                        moved += bool(others)
                        failed += not others
        return moved, failed

    async def run(self, sweep_seconds: float) -> None:
        """Sweeps until cancelled. It may take long, so nothing else waits for it."""
        while True:
            await asyncio.sleep(sweep_seconds)
            try:
                await self.sweep()
            except Unavailable as error:
                log.warning("stranded jobs wait", reason=str(error))

    async def sweep(self) -> None:
        """Moves or fails the jobs that came to the queue of an endpoint after it went away; one that its users may use
        again has its jobs back.

        Not while an endpoint retires here: that may take long, and both would look after the same jobs.

        Raises:
            Unavailable: a service or the database does not answer, and would not for the next job either.
        """
        if self._at_it.locked():
            return
        async with self._at_it:
            usable = _UsableEndpoints(self._peers)
            for job, why in await self._store.stranded():
                try:
                    found = await usable.of(job)
                    if any(endpoint.id == job.endpoint_id for endpoint in found):
                        await self._store.revive(job.endpoint_id)
                    else:
                        await self._settle(job, why, found)
                except Unavailable:
                    raise
                except EsdError as error:  # one job's trouble is not the others'; the next sweep tries again
                    log.warning("a stranded job waits", job=str(job.id), reason=str(error))

    async def _settle(self, job: Job, reason: str, others: list[Endpoint]) -> bool:
        """Moves a stranded job to one of the endpoints, or fails it where there is none. False: it is not stranded any
        more."""
        if not others:
            return await self._store.fail_stranded(job, reason or f"endpoint {job.endpoint_name} went away")
        new = random.choice(others)  # noqa: S311 - load, not secrets
        return await self._store.move(job, (new.id, new.name, new.instance_type))


class _UsableEndpoints:
    """The endpoints that jobs may run on; of jobs of one user and type they are asked for once."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._found: dict[tuple[str, str], list[Endpoint]] = {}

    async def of(self, job: Job) -> list[Endpoint]:
        """Those for the job.

        Raises:
            Unavailable: a service does not answer.
        """
        pair = (job.owner, job.inference_type)
        if pair not in self._found:
            user = await self._peers.users.find_user(job.owner)
            viewer = Viewer(job.owner, user.roles if user else [])
            self._found[pair] = await self._peers.find_endpoints(job.inference_type, viewer)
        return self._found[pair]
