"""The checkpoints that an endpoint's workers keep ready, as files that a worker can fetch."""

from __future__ import annotations

from uuid import UUID

import structlog

from services.common.blobs import Blobs
from services.common.leftovers import WRITABLE_SECONDS
from services.common.payloads.models import BASE
from services.common.viewer import Viewer
from services.inference.peers import Model, Peers
from services.inference.queue.pool_store import PoolStore

log = structlog.get_logger()


class Pins:
    """Remembers names, and finds the files behind them whenever a worker asks, since files are renamed and deleted."""

    def __init__(self, pools: PoolStore, peers: Peers, blobs: Blobs) -> None:
        self._pools = pools
        self._peers = peers
        self._blobs = blobs

    async def pin(self, endpoint_id: UUID, names: list[str]) -> None:
        """Says which checkpoints the endpoint's workers keep ready from now on."""
        await self._pools.pin(endpoint_id, names)

    async def files(self, endpoint_id: UUID) -> list[tuple[Model, str]]:
        """The files with URLs of them; what is not there any more is left out.

        Raises:
            Unavailable: the models service does not answer.
        """
        names = await self._pools.pinned(endpoint_id)
        if not names:
            return []
        # Whoever pinned them was allowed to; the endpoint's jobs may be of others.
        wanted = [(BASE, name) for name in names]
        found, missing = await self._peers.resolve_checkpoints(wanted, Viewer("", [], sees_everything=True))
        if missing:
            log.warning("pinned checkpoints are gone", endpoint=str(endpoint_id), names=[name for _, name in missing])
        order = {name: place for place, name in enumerate(names)}
        found.sort(key=lambda model: order.get(model.name, len(order)))
        return [(model, self._blobs.presign_get(model.key, WRITABLE_SECONDS)) for model in found]
