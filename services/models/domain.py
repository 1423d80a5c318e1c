"""Decides about checkpoints: who may see and change them, when an upload is complete, and what is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any
from uuid import UUID, uuid4

import structlog

from services.common.blobs import BlobNotFound, Blobs
from services.common.errors import FailedPrecondition, InvalidArgument, PermissionDenied, Unavailable
from services.common.ids import parse_id
from services.common.sentences import printable
from services.common.structs import check_params
from services.common.times import time_text
from services.common.users import Users
from services.common.viewer import EVERYTHING, Viewer
from services.models.checks import Tag, complete_parts, file_name, first_repeated, stored_parts
from services.models.inspection import Findings, inspect
from services.models.pickles import Refused
from services.models.rows import ACTIVE, STATUSES, Checkpoint, CheckpointFile
from services.models.store import CheckpointNotFound, Filters, Inspected, ModelStore, NameInUse, UsableFile

log = structlog.get_logger()

PART_URL_SECONDS = 24 * 3600  # the legacy hour is shorter than the upload of a large model
LOOK_MAX_BYTES = 256 * 1024 * 1024  # larger objects are not read as a whole while their client waits
_CUSTOM = "/checkpoint/custom/"


@dataclass(frozen=True)
class NewFile:
    """A file that a client wants to upload."""

    filename: str
    parts_number: int


@dataclass(frozen=True)
class Resolved:
    """An active file that a job may use, and where its checkpoint is, `s3://…`."""

    file: UsableFile
    s3_location: str


class Models:
    """Checkpoints, in the object store and in the tables."""

    def __init__(self, store: ModelStore, blobs: Blobs, users: Users, look_max_bytes: int = LOOK_MAX_BYTES) -> None:
        self._store = store
        self._blobs = blobs
        self._users = users
        self._look_max_bytes = look_max_bytes

    def s3_location(self, checkpoint: Checkpoint) -> str:
        """The folder of the checkpoint's objects, `s3://…`."""
        return self._location(checkpoint.type, checkpoint.id, checkpoint.folder)

    async def list_checkpoints(
        self, viewer: Viewer, page: int, per_page: int, filters: Filters, username: str
    ) -> tuple[list[Checkpoint], int]:
        """The page and the total of what the viewer may see, and the user `username` too if one is named.

        A viewer who sees everything does so whoever is named (contract 4.1).

        Raises:
            InvalidArgument: there is no such user.
        """
        viewers = [viewer]
        if username and username != viewer.name:
            user = await self._users.get_user(username)
            if not viewer.sees_everything:
                viewers.append(Viewer(user.username, user.roles, EVERYTHING in user.permissions))
        seen = Filters(viewers, filters.statuses, filters.types, filters.owners)
        return await self._store.page_checkpoints(seen, page, per_page)

    async def create_checkpoint(
        self, creator: Viewer, kind: str, files: Sequence[NewFile], params: dict[str, Any]
    ) -> tuple[Checkpoint, dict[str, list[str]]]:
        """Opens an upload for each file, and answers the checkpoint and each file's part URLs in order.

        Raises:
            InvalidArgument: a name that cannot be a file's, or params that cannot be kept. NameInUse.
        """
        names = [file_name(file.filename) for file in files]
        if not names:
            raise InvalidArgument("filenames or urls must name at least one file")
        check_params(params)
        if twice := first_repeated(names):
            raise InvalidArgument(f"filenames: {twice} is given more than once")
        if used := await self._store.find_used_name(names):
            raise NameInUse(used)
        now = datetime.now(UTC)
        checkpoint = Checkpoint(
            id=uuid4(), type=kind, owners=list(creator.roles) or [creator.name], created_at=now, params={}
        )
        try:
            for position, (name, file) in enumerate(zip(names, files, strict=True)):
                await self._open(checkpoint, position, name, file.parts_number)
            uploads = {
                file.name: {"upload_id": file.upload_id, "bucket": self._blobs.bucket, "key": file.key}
                for file in checkpoint.files
            }
            checkpoint.params = params | {
                "creator": creator.name,
                "created": time_text(now),
                "multipart_upload": uploads,
            }
            await self._store.add_checkpoint(checkpoint)
        except BaseException:
            await asyncio.shield(self._abort_uploads(checkpoint))
            raise
        urls = await asyncio.to_thread(lambda: [self._part_urls(file) for file in checkpoint.files])  # up to 2000
        return checkpoint, {asked.filename: parts for asked, parts in zip(files, urls, strict=True)}

    async def get_checkpoint(self, viewer: Viewer, checkpoint_id: str) -> Checkpoint:
        """The checkpoint, for somebody who wants to change it.

        Raises:
            CheckpointNotFound, PermissionDenied.
        """
        parsed = parse_id(checkpoint_id)
        if parsed is None:
            raise CheckpointNotFound(checkpoint_id)
        checkpoint = await self._store.get_checkpoint(parsed)
        _check_owner(viewer, checkpoint)
        return checkpoint

    async def update_status(
        self, checkpoint: Checkpoint, status: str, tags: Mapping[str, Sequence[Tag]]
    ) -> tuple[Checkpoint, str]:
        """Completes and inspects the files of which tags are given, then sets the status; answers the one before.

        The status takes effect once every file is complete, so a client may finish file by file. Complete files may be
        named again. A wrong tag changes nothing; a refused file ends the checkpoint (see `refuse`). Files of more than
        `look_max_bytes` are inspected in the background, after the answer.

        Raises:
            InvalidArgument: status or tags are wrong. FailedPrecondition: a file is no sound model.
        """
        before = checkpoint.status
        if not tags:
            raise InvalidArgument("multi parts tags is empty")
        if status not in STATUSES:
            allowed = json.dumps(STATUSES, separators=(",", ":"))
            raise InvalidArgument(
                f'[status: instance value ("{status}") not found in enum (possible values: {allowed})]'
            )
        if checkpoint.source is not None and checkpoint.is_unfinished:
            raise FailedPrecondition(f"checkpoint {checkpoint.id} is being imported from {checkpoint.source}")
        if checkpoint.folder is not None and checkpoint.is_unfinished:
            raise FailedPrecondition(f"checkpoint {checkpoint.id} is being trained")
        _check_not_refused(checkpoint)
        given = {name.strip(): parts for name, parts in tags.items()}
        open_files = [file for file in checkpoint.files if not file.complete]
        named = [file for file in open_files if file.name in given]
        if open_files and not set(given) & set(checkpoint.names):
            raise InvalidArgument(
                f"multi_parts_tags names none of the checkpoint's files ({', '.join(checkpoint.names)}) but "
                f"{printable(', '.join(sorted(given)))}"
            )
        parts = {file.name: complete_parts(file, given[file.name]) for file in named}
        for file in named:
            await self._complete(file, parts[file.name])
            # From here on a deletion or refusal finds the object, and removes it.
            await self._check_goes_on(checkpoint)
            try:
                if (await self._blobs.head(file.key)).size_bytes <= self._look_max_bytes:
                    await self.keep(checkpoint, file)
                else:
                    await self._store.save_look(checkpoint.id, file.name, status)
            except (BlobNotFound, Unavailable):  # which is what an object is like that is being removed
                await self._check_goes_on(checkpoint)
                raise
        return await self._store.save_status(checkpoint.id, status), before

    async def rename(self, checkpoint: Checkpoint, name: str) -> bool:
        """Renames the first file, whose extension stays, and answers whether there is anything to do.

        The new name counts at once; the object follows in the background.

        Raises:
            FailedPrecondition: the checkpoint is not active. NameInUse. InvalidArgument: with the extension the name is
            too long.
        """
        if checkpoint.status != ACTIVE:
            raise FailedPrecondition("only active can update name")
        first = checkpoint.names[0]
        if not PurePosixPath(name).suffix:
            name = file_name(name + PurePosixPath(first).suffix)
        if name == first:
            return False
        if await self._store.find_used_name([name]):
            raise NameInUse(name)
        await self._store.save_name(checkpoint.id, first, name, prefix_of(checkpoint) + name)
        return True

    async def delete_checkpoints(self, viewer: Viewer, checkpoint_ids: Sequence[str]) -> None:
        """Deletes checkpoints, and in the background their open uploads and objects; unknown ids are skipped.

        Raises:
            PermissionDenied: one is somebody else's; none is deleted then.
        """
        parsed = {known for checkpoint_id in checkpoint_ids if (known := parse_id(checkpoint_id)) is not None}
        found = await self._store.find_checkpoints(sorted(parsed))
        for checkpoint in found:
            _check_owner(viewer, checkpoint)
        # Another chore may make an object after they are removed: it finds no row, and removes what it makes.
        await self._store.remove_checkpoints({checkpoint.id: prefix_of(checkpoint) for checkpoint in found})

    async def resolve_checkpoints(self, names: Sequence[tuple[str, str]], viewer: Viewer) -> list[Resolved | None]:
        """For each (type, name) the active file that the viewer may use, or None."""
        found = await self._store.resolve_files(names, viewer) if names else {}
        return [
            Resolved(file, self._location(file.type, file.checkpoint_id, file.folder))
            if (file := found.get(pair))
            else None
            for pair in names
        ]

    def _location(self, kind: str, checkpoint_id: UUID, own_folder: str | None) -> str:
        return self._blobs.url(_folder(kind, checkpoint_id, own_folder).rstrip("/"))

    async def _open(self, checkpoint: Checkpoint, position: int, name: str, parts_number: int) -> None:
        key = prefix_of(checkpoint) + name
        checkpoint.files.append(
            CheckpointFile(
                checkpoint_id=checkpoint.id,
                position=position,
                name=name,
                key=key,
                upload_id=await self._blobs.create_multipart(key),
                parts_number=parts_number,
            )
        )

    def _part_urls(self, file: CheckpointFile) -> list[str]:
        numbers = range(1, file.parts_number + 1)
        return [self._blobs.presign_part(file.key, file.upload_id, number, PART_URL_SECONDS) for number in numbers]

    async def _complete(self, file: CheckpointFile, parts: list[tuple[int, str]]) -> None:
        """Completes an upload, or finds that an earlier request did so without getting further."""
        if not file.upload_id:  # it waits to be looked at
            return
        try:
            stored = stored_parts(file.name, parts, await self._blobs.list_parts(file.key, file.upload_id))
            await self._finish(file, stored)
        except BlobNotFound:
            try:
                await self._blobs.head(file.key)
            except BlobNotFound:
                raise FailedPrecondition(
                    f"{file.name}: the upload is not open any more and left no object; delete the checkpoint and "
                    "create it again"
                ) from None

    async def _finish(self, file: CheckpointFile, parts: list[tuple[int, str]]) -> None:
        try:
            await self._blobs.complete_multipart(file.key, file.upload_id, parts)
        except InvalidArgument as error:  # that all but the last are too small, say
            again = "upload its parts again to their URLs, or delete the checkpoint and create it again"
            raise InvalidArgument(f"{error}; {again}") from None

    async def _check_goes_on(self, checkpoint: Checkpoint) -> None:
        """Removes the object that was just completed, where the checkpoint has ended meanwhile.

        Raises:
            CheckpointNotFound: it was deleted. FailedPrecondition: it was refused.
        """
        try:
            _check_not_refused(await self._store.get_checkpoint(checkpoint.id))
        except (CheckpointNotFound, FailedPrecondition):
            await self.delete_objects(checkpoint)
            raise

    async def keep(
        self, checkpoint: Checkpoint, file: CheckpointFile, sha256: str = "", status: str | None = None
    ) -> None:
        """Inspects a complete object and remembers what it is, or refuses it. Its hash is taken where none is given.

        The status, if one is given, is set with it when this was the last file.

        Raises:
            FailedPrecondition: it was refused. CheckpointNotFound: it was deleted meanwhile. BlobNotFound.
        """
        size = (await self._blobs.head(file.key)).size_bytes
        try:
            findings = await self._inspect(file, size)
        except Refused as refusal:
            reason = printable(f"{file.name} {refusal}")
            await self.refuse(checkpoint, reason)
            raise FailedPrecondition(reason) from None
        if not sha256:
            sha256 = (await self._blobs.digest(file.key)).sha256
        found = asdict(findings) if findings.format else {}
        await self._store.save_complete(checkpoint.id, file.name, Inspected(size, sha256, found), status)

    async def _inspect(self, file: CheckpointFile, size: int) -> Findings:
        loop = asyncio.get_running_loop()

        def fetch(first: int, last: int) -> bytes:
            return asyncio.run_coroutine_threadsafe(self._blobs.get(file.key, first, last), loop).result()

        return await asyncio.to_thread(inspect, file.name, size, fetch)

    async def refuse(
        self, checkpoint: Checkpoint, reason: str, only_open: bool = False, keeps_objects: bool = False
    ) -> None:
        """Ends a checkpoint with a file that must not be loaded.

        It becomes `Disabled` with the reason in `params.error`, its objects go, in the background, unless it keeps
        them, and its names are free again: what people want next is to upload the mended file under the same name. The
        row stays, so that they can read why.
        """
        reason = printable(reason)  # it may quote a hostile file
        log.warning("checkpoint refused", checkpoint=str(checkpoint.id), reason=reason)
        await self._store.save_refusal(checkpoint.id, reason, only_open, keeps_objects)

    async def delete_objects(self, checkpoint: Checkpoint) -> None:
        """Ends the checkpoint's open uploads, also those of which no row tells, and removes its objects."""
        await self._abort_uploads(checkpoint)
        await self._blobs.delete_prefix(prefix_of(checkpoint))
        await self._blobs.abort_uploads(prefix_of(checkpoint))

    async def _abort_uploads(self, checkpoint: Checkpoint) -> None:
        for file in checkpoint.files:
            if not file.complete and file.upload_id:
                await self._blobs.abort_multipart(file.key, file.upload_id)


def prefix_of(checkpoint: Checkpoint) -> str:
    """The folder of the checkpoint's objects in the bucket."""
    return _folder(checkpoint.type, checkpoint.id, checkpoint.folder)


def _folder(kind: str, checkpoint_id: UUID, own_folder: str | None) -> str:
    return own_folder or f"{kind}{_CUSTOM}{checkpoint_id}/"


def checkpoint_of(key: str) -> UUID | None:
    """The id of the checkpoint in whose folder an object of a client's is; None for other objects."""
    _, is_one, path = key.partition(_CUSTOM)
    return parse_id(path.partition("/")[0]) if is_one else None


def _check_owner(viewer: Viewer, checkpoint: Checkpoint) -> None:
    if not viewer.sees(checkpoint.owners):
        raise PermissionDenied(
            f"checkpoint {checkpoint.id} belongs to {', '.join(checkpoint.owners)}; {viewer.name} is not among "
            f"them and has no {EVERYTHING}"
        )


def _check_not_refused(checkpoint: Checkpoint) -> None:
    if checkpoint.error is not None:
        raise FailedPrecondition(f"checkpoint {checkpoint.id} was refused: {checkpoint.error}; upload it again")
