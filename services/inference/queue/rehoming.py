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


class Rehoming:
    """Finds homes for stranded jobs."""

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
                homes = _Homes(self._peers)
                for job, why in stranded:
                    if await self._rehome(job, why, homes, revivable=False):
                        moved += 1
                    else:
                        failed += 1
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
        """Finds homes for the jobs that came to the queue of an endpoint after it went away.

        Not while an endpoint retires here: that may take long, and both would look for homes of the same jobs.

        Raises:
            Unavailable: a service or the database does not answer, and would not for the next job either.
        """
        if self._at_it.locked():
            return
        async with self._at_it:
            homes = _Homes(self._peers)
            for job, why in await self._store.stranded():
                try:
                    await self._rehome(job, why, homes, revivable=True)
                except Unavailable:
                    raise
                except EsdError as error:  # one job's trouble is not the others'; the next sweep tries again
                    log.warning("a stranded job waits", job=str(job.id), reason=str(error))

    async def _rehome(self, job: Job, reason: str, homes: _Homes, *, revivable: bool) -> bool:
        """Moves a stranded job to an endpoint that its owner may use, or fails it; True when it was moved."""
        usable = await homes.find(job.owner, job.inference_type)
        if revivable and any(endpoint.id == job.endpoint_id for endpoint in usable):
            await self._store.revive(job.endpoint_id)
            return True
        others = [endpoint for endpoint in usable if endpoint.id != job.endpoint_id]
        if not others:
            await self._store.fail_queued(job.id, reason or f"endpoint {job.endpoint_name} went away")
            return False
        new = random.choice(others)  # noqa: S311 - load, not secrets
        await self._store.move(job.id, (new.id, new.name, new.instance_type))
        return True


class _Homes:
    """The endpoints that a user's jobs of a type may run on; during one sweep each pair is asked for once."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._found: dict[tuple[str, str], list[Endpoint]] = {}

    async def find(self, owner: str, inference_type: str) -> list[Endpoint]:
        """The usable endpoints.

        Raises:
            Unavailable: a service does not answer.
        """
        pair = (owner, inference_type)
        if pair not in self._found:
            user = await self._peers.users.find_user(owner)
            viewer = Viewer(owner, user.roles if user else [])
            self._found[pair] = await self._peers.find_endpoints(inference_type, viewer)
        return self._found[pair]
