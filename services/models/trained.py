"""Decides about checkpoints that a training makes: their name is taken when it begins, their files come at its end, and
lie where it wrote them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

from services.common.blobs import BlobNotFound, Blobs
from services.common.errors import FailedPrecondition
from services.common.payloads.models import LORA
from services.common.times import time_text
from services.common.viewer import Viewer
from services.models.checks import file_name
from services.models.domain import Models
from services.models.rows import ACTIVE, INITIAL, Checkpoint, CheckpointFile
from services.models.store import ModelStore, NameInUse


@dataclass(frozen=True)
class TrainedFile:
    """A file of a training; `sha256` in hex."""

    name: str
    sha256: str


class Trained:
    """Checkpoints of trainings, whose ids they share."""

    def __init__(self, models: Models, store: ModelStore, blobs: Blobs) -> None:
        self._models = models
        self._store = store
        self._blobs = blobs

    async def create_checkpoint(self, checkpoint_id: UUID, name: str, owner: Viewer) -> None:
        """Opens a checkpoint with the name of the training's last file; one that is there stays as it is.

        Raises:
            NameInUse. InvalidArgument: it cannot be a file's name.
        """
        if await self._store.find_checkpoints([checkpoint_id]):
            return
        name = file_name(name)
        if await self._store.find_used_name([name]):
            raise NameInUse(name)
        now = datetime.now(UTC)
        checkpoint = Checkpoint(
            id=checkpoint_id,
            type=LORA,
            owners=list(owner.roles) or [owner.name],
            created_at=now,
            params={"creator": owner.name, "created": time_text(now)},
            folder=folder_of(checkpoint_id),
        )
        checkpoint.files.append(_file(checkpoint, 0, name))
        await self._store.add_checkpoint(checkpoint)

    async def finish_checkpoint(
        self, checkpoint_id: UUID, files: Sequence[TrainedFile], reason: str
    ) -> tuple[list[str], str]:
        """Makes the checkpoint Active with those of the files whose names are free; answers its names, and why it was
        refused. Without any file it is Disabled for the reason, and so it is where one is damaged or gone. One that has
        ended stays as it is."""
        found = await self._store.find_checkpoints([checkpoint_id])
        if not found:
            await self._blobs.delete_prefix(folder_of(checkpoint_id))
            return [], ""
        checkpoint = found[0]
        if checkpoint.status == INITIAL:
            checkpoint = await self._finish(checkpoint, files, reason)
        return (checkpoint.names, "") if checkpoint.status == ACTIVE else ([], checkpoint.error or "")

    async def delete_checkpoint(self, checkpoint_id: UUID) -> bool:
        """Deletes the checkpoint, and in the background its objects, unless it is Active; True: it is."""
        return bool(await self._store.remove_checkpoints({checkpoint_id: folder_of(checkpoint_id)}, keeps_active=True))

    async def _finish(self, checkpoint: Checkpoint, files: Sequence[TrainedFile], reason: str) -> Checkpoint:
        hashes = {file.name: file.sha256 for file in files}
        new = [_file(checkpoint, position, file.name) for position, file in enumerate(files)]
        kept = await self._store.save_files(checkpoint.id, new) if new else []
        if kept is None:  # another replica was told too, and has ended it
            return await self._store.get_checkpoint(checkpoint.id)
        if not kept:
            await self._models.refuse(checkpoint, reason or "the training left no file", keeps_objects=True)
        else:
            for file in kept:
                try:
                    await self._models.keep(checkpoint, file, hashes[file.name])
                except FailedPrecondition:  # it is no sound network: the row says so
                    return await self._store.get_checkpoint(checkpoint.id)
                except BlobNotFound:  # nothing of ours removes it, and nothing will bring it back
                    missing = f"{file.name} is not in the object store any more"
                    await self._models.refuse(checkpoint, missing, keeps_objects=True)
                    return await self._store.get_checkpoint(checkpoint.id)
            return await self._store.save_status(checkpoint.id, ACTIVE)
        return await self._store.get_checkpoint(checkpoint.id)


def folder_of(training_id: UUID) -> str:
    """Where a training's results are (contract 7.1)."""
    return f"kohya/train/{training_id}/output/"


def _file(checkpoint: Checkpoint, position: int, name: str) -> CheckpointFile:
    return CheckpointFile(
        checkpoint_id=checkpoint.id,
        position=position,
        name=name,
        key=folder_of(checkpoint.id) + name,
        upload_id="",
        parts_number=0,
    )
