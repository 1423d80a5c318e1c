"""Does what checkpoints need after their requests were answered: looks at large files, moves renamed objects, ends
abandoned uploads, removes what was refused.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID

import structlog

from services.common.blobs import BlobNotFound, Blobs
from services.common.errors import FailedPrecondition, Unavailable
from services.models.domain import Models, checkpoint_of
from services.models.rows import INITIAL, Checkpoint, CheckpointFile
from services.models.store import CheckpointNotFound, ModelStore

log = structlog.get_logger()

_MAX_LOOKS = 10  # at one file, unless what is in the way may pass


class Background:
    """The chores of checkpoints. Each may be cut short anywhere and done again."""

    def __init__(
        self, models: Models, store: ModelStore, blobs: Blobs, upload_max_hours: float, renamed_keep_hours: float
    ) -> None:
        self._models = models
        self._store = store
        self._blobs = blobs
        self._upload_max_hours = upload_max_hours
        self._renamed_keep = timedelta(hours=renamed_keep_hours)

    async def end_stale_uploads(self) -> None:
        """Ends uploads that were not finished in time: their parts go, their names are free, the row says why."""
        before = datetime.now(UTC) - timedelta(hours=self._upload_max_hours)
        reason = f"the upload was not finished within {self._upload_max_hours:g} h"
        while found := await self._store.find_stale_uploads(before):
            for checkpoint in found:
                await self._models.refuse(checkpoint, reason, only_open=True)
        await self._end_stray_uploads(before)

    async def _end_stray_uploads(self, before: datetime) -> None:
        """Ends uploads from before then whose checkpoint is not there: the request that opened them was cut short."""
        for upload in await self._blobs.find_uploads(""):
            checkpoint_id = checkpoint_of(upload.key)
            if upload.opened_at < before and checkpoint_id and not await self._store.find_checkpoints([checkpoint_id]):
                await self._blobs.abort_multipart(upload.key, upload.upload_id)

    async def look(self, checkpoint_id: str, file_name: str, status: str, num_tried: int = 0) -> None:
        """Looks at a file that was too large to be looked at while its client waited, and sets the status."""
        for checkpoint in await self._store.find_checkpoints([UUID(checkpoint_id)]):
            for file in checkpoint.files:
                if file.name == file_name and not file.complete and checkpoint.status == INITIAL:
                    await self._look(checkpoint, file, status, is_last=num_tried + 1 >= _MAX_LOOKS)

    async def _look(self, checkpoint: Checkpoint, file: CheckpointFile, status: str, is_last: bool) -> None:
        words = {"checkpoint": str(checkpoint.id), "file": file.name}
        try:
            await self._models.keep(checkpoint, file, status=status)
        except BlobNotFound:
            await self._models.refuse(checkpoint, f"{file.name} is gone from the object store; upload it again")
        except (CheckpointNotFound, FailedPrecondition) as end:  # it was deleted meanwhile, or refused, and says why
            log.info("nothing to look at any more", reason=str(end), **words)
        except Unavailable:
            raise
        except Exception:
            if not is_last:
                raise
            log.exception("a file cannot be looked at", **words)
            await self._models.refuse(checkpoint, f"{file.name} cannot be looked at; the service's log has the details")

    async def remove_refused(self, checkpoint_id: str) -> None:
        """Removes what a refused checkpoint has left in the object store."""
        for checkpoint in await self._store.find_checkpoints([UUID(checkpoint_id)]):
            await self._models.delete_objects(checkpoint)

    async def remove_objects(self, prefix: str) -> None:
        """Removes what a deleted checkpoint has left in the object store."""
        await self._blobs.delete_prefix(prefix)
        await self._blobs.abort_uploads(prefix)

    async def move_objects(self, checkpoint_id: str) -> None:
        """Copies the objects of renamed files to their new keys. Until then each is found, and used, under the old.

        The old ones stay for a while: jobs that were queued before name them.
        """
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
                await self._blobs.abort_uploads(new)  # of a copy that was cut short
                await self._blobs.copy(old, new)
            except BlobNotFound:
                log.warning("an object to rename is gone", key=old)
                return
            if not await self._store.save_moved(parsed, old, new, self._renamed_keep):
                await self.remove_object(checkpoint_id, new)  # deleted, renamed again or moved already meanwhile

    async def remove_object(self, checkpoint_id: str, key: str) -> None:
        """Removes the object of a checkpoint under a key that no file of it has, or will have, any more."""
        for checkpoint in await self._store.find_checkpoints([UUID(checkpoint_id)]):
            if any(key in (file.key, file.next_key) for file in checkpoint.files):
                return
        await self._blobs.delete(key)
