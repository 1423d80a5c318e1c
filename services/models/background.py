"""Does what checkpoints need after their requests were answered: moves renamed objects."""

from __future__ import annotations

from uuid import UUID

import structlog

from services.common.blobs import BlobNotFound, Blobs
from services.models.store import CheckpointNotFound, ModelStore

log = structlog.get_logger()


class Background:
    """The chores of checkpoints. Each may be cut short anywhere and done again."""

    def __init__(self, store: ModelStore, blobs: Blobs) -> None:
        self._store = store
        self._blobs = blobs

    async def move_objects(self, checkpoint_id: str, is_last: bool) -> None:
        """Moves the objects of renamed files to their new keys. Until then each is found, and used, under the old."""
        parsed = UUID(checkpoint_id)
        try:
            checkpoint = await self._store.get_checkpoint(parsed)
        except CheckpointNotFound:
            return
        for file in checkpoint.files:
            if file.next_key is None:
                continue
            old, new = file.key, file.next_key
            try:
                await self._blobs.copy(old, new)
            except BlobNotFound:
                log.warning("an object to rename is gone", key=old)
                return
            if await self._store.save_moved(parsed, old, new):
                await self._blobs.delete(old)
            else:
                await self._blobs.delete(new)  # deleted or renamed again meanwhile
