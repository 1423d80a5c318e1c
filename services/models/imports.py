"""Brings checkpoints from URLs: streamed into the object store part by part, without touching the disk.

Every part that the store has is noted in the import's row. Another attempt, after a lost connection or process, goes on
behind the last of them where the source can give a range of what is provably the same file, else from the beginning.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import structlog

from services.common.blobs import BlobNotFound, Blobs
from services.common.errors import EsdError, FailedPrecondition, InvalidArgument, Unavailable
from services.common.outbound import Outbound, Unreachable, Url, UrlRefused, parse_url
from services.common.sentences import printable
from services.common.structs import check_params
from services.common.times import time_text
from services.common.viewer import Viewer
from services.models.checks import first_repeated
from services.models.domain import Models, prefix_of
from services.models.import_store import IMPORT, Import, ImportStore, Superseded, new_file
from services.models.parts import Limits, Parts
from services.models.rows import ACTIVE, Checkpoint, CheckpointFile
from services.models.sources import check_status, first_byte, name_in, name_of, validator_of
from services.models.store import ModelStore, NameInUse

log = structlog.get_logger()

_NAME_SECONDS = 10.0
_MAX_ASKED = 20  # sources at once, for all requests together
_MAX_FAILURES = 10  # of attempts without a part between them
_OVERDUE_HOURS = 1.0  # what may follow the transfer, beyond the hours that an import may take
_INTERNAL = "an internal error ended the import; the service's log has the details"


class Imports:
    """Imports, from the request to the active checkpoint."""

    def __init__(
        self, models: Models, store: ModelStore, imports: ImportStore, blobs: Blobs, outbound: Outbound, limits: Limits
    ) -> None:
        self._models = models
        self._store = store
        self._imports = imports
        self._blobs = blobs
        self._outbound = outbound
        self._limits = limits
        self._asking = asyncio.Semaphore(_MAX_ASKED)

    async def create_imports(
        self, creator: Viewer, kind: str, urls: Sequence[str], hashes: Mapping[str, str], params: dict[str, Any]
    ) -> None:
        """Adds a checkpoint for each different URL, and has it filled in the background.

        `hashes` are the SHA-256 in hex that are expected, by URL.

        Raises:
            InvalidArgument: a URL that cannot be fetched, a hash for no URL, or params that are too large. NameInUse.
            ResourceExhausted: too many imports of the creator have not ended.
        """
        check_params(params)
        different = list(dict.fromkeys(urls))
        if strangers := sorted(set(hashes) - set(different)):
            raise InvalidArgument(f'sha256["{strangers[0]}"] is none of the urls')
        parsed = [parse_url(url) for url in different]
        names = await asyncio.gather(*(self._name(url) for url in parsed))
        known = [name for name in names if name]
        if twice := first_repeated(known):
            raise InvalidArgument(f"urls: two of them name a file {twice}")
        if used := await self._store.find_used_name(known):
            raise NameInUse(used)
        now = datetime.now(UTC)
        added = []
        for text, url, name in zip(different, parsed, names, strict=True):
            checkpoint = Checkpoint(
                id=uuid4(),
                type=kind,
                owners=list(creator.roles) or [creator.name],
                created_at=now,
                source=url.shown,
                params=params
                | {
                    "creator": creator.name,
                    "created": time_text(now),
                    "multipart_upload": {},
                    IMPORT: {"url": url.shown, "bytes_done": 0, "bytes_total": None},
                },
            )
            if name:
                checkpoint.files.append(new_file(checkpoint.id, name, prefix_of(checkpoint) + name))
            added.append((checkpoint, Import(checkpoint_id=checkpoint.id, url=str(url), sha256=hashes.get(text, ""))))
        await self._imports.add_imports(creator.name, added, self._limits.max_per_user)

    async def _name(self, url: Url) -> str:
        """The name of the file, for which the source is asked where the URL has none (contract 4.2).

        Empty where the source does not tell it soon: then the import finds it, and ends if it is in use.
        """
        if name := name_in(url):
            return name
        with contextlib.suppress(EsdError, TimeoutError):
            async with asyncio.timeout(_NAME_SECONDS), self._asking, self._outbound.open(str(url)) as answer:
                check_status(answer)
                return name_of(answer)
        return ""

    async def run(self, checkpoint_id: str) -> None:
        """One attempt at an import, as a chore. What the source is to blame for counts; what this side is, may pass.

        Raises:
            Unavailable: so another attempt is to follow.
        """
        taken = await self._imports.begin(UUID(checkpoint_id))
        if taken is None:
            return
        checkpoint, held = taken
        try:
            try:
                await self._attempt(checkpoint, held)
            except Unavailable as error:
                is_ours = not isinstance(error, Unreachable)
                if is_ours or await self._imports.save_failure(held) < _MAX_FAILURES:
                    log.warning("import to be tried again", checkpoint=checkpoint_id, reason=str(error))
                    raise
                await self._fail(held, str(error))
            except EsdError as error:
                await self._fail(held, str(error))
            except Superseded:
                raise
            except Exception:
                log.exception("import failed", checkpoint=checkpoint_id)
                if await self._imports.save_failure(held) < _MAX_FAILURES:
                    raise
                await self._fail(held, _INTERNAL)
        except Superseded:
            await self._clean_up(checkpoint)

    async def end_overdue(self) -> None:
        """Ends imports that no attempt has ended in their time: whatever kept all of them from it."""
        begin = datetime.now(UTC) - timedelta(hours=self._limits.max_hours + _OVERDUE_HOURS)
        for held in await self._imports.find_imports(begin):
            with contextlib.suppress(Superseded):
                await self._fail(held, self._too_long)

    @property
    def _too_long(self) -> str:
        return f"the import took longer than {self._limits.max_hours:g} h"

    async def _attempt(self, checkpoint: Checkpoint, held: Import) -> None:
        if checkpoint.error is not None:  # an earlier attempt ended before it had said so
            await self._fail(held, checkpoint.error)
            return
        if checkpoint.is_unfinished:
            assert held.began_at is not None, "this attempt has begun"
            left = held.began_at.timestamp() + self._limits.max_hours * 3600 - datetime.now(UTC).timestamp()
            digest = ""
            if not held.parts or held.bytes_done != held.bytes_total:
                try:
                    async with asyncio.timeout(max(left, 0)) as clock:
                        digest, held = await self._transfer(checkpoint, held)
                except TimeoutError:
                    if not clock.expired():
                        raise
                    raise UrlRefused(self._too_long) from None
            checkpoint = await self._store.get_checkpoint(checkpoint.id)
            await self._complete(checkpoint, held, digest)
        await self._store.save_status(checkpoint.id, ACTIVE)
        await self._imports.remove(checkpoint.id)

    async def _transfer(self, checkpoint: Checkpoint, held: Import) -> tuple[str, Import]:
        """Streams what is missing; answers the SHA-256, empty where the beginning came in an earlier attempt."""
        headers = {}
        if held.parts and held.validator:
            headers = {"Range": f"bytes={held.bytes_done}-", "If-Range": held.validator}
        async with self._outbound.open(held.url, headers=headers) as answer:
            if answer.status == 416 and headers:
                await self._start(checkpoint.files[0], held, "", None)
                raise Unreachable(f"{answer.hops[-1].shown} has no more of the file, so it is fetched again")
            check_status(answer)
            goes_on = answer.status == 206 and first_byte(answer) == held.bytes_done and bool(headers)
            if answer.status == 206 and not goes_on:
                raise UrlRefused(f"{answer.hops[-1].shown} sends another part of the file than was asked for")
            length = answer.headers.get("content-length", "")
            total = int(length) + (held.bytes_done if goes_on else 0) if length.isdecimal() else None
            if total is not None and total > self._limits.max_bytes:
                raise UrlRefused(f"{total} bytes are too many, {self._limits.max_bytes} are allowed")
            if not checkpoint.files:
                name = name_of(answer)
                checkpoint = await self._imports.save_name(held, name, prefix_of(checkpoint) + name)
            file = checkpoint.files[0]
            if not goes_on:
                held = await self._start(file, held, validator_of(answer), total)
            upload_id = file.upload_id if goes_on else await self._upload_id(checkpoint.id)
            parts = Parts(self._blobs, self._imports, file.key, upload_id, held, self._limits)
            async with contextlib.aclosing(parts):
                async for chunk in answer.chunks():
                    await parts.add(chunk)
                return "" if goes_on else parts.digest.hexdigest(), await parts.end()

    async def _start(self, file: CheckpointFile, held: Import, validator: str, total: int | None) -> Import:
        if file.upload_id:
            await self._blobs.abort_multipart(file.key, file.upload_id)
        upload_id = await self._blobs.create_multipart(file.key)
        upload = {"uploadId": upload_id, "key": file.key, "bucket": self._blobs.bucket}
        try:
            return await self._imports.save_start(held, upload, validator, total)
        except BaseException:
            await asyncio.shield(self._blobs.abort_multipart(file.key, upload_id))
            raise

    async def _upload_id(self, checkpoint_id: UUID) -> str:
        return (await self._store.get_checkpoint(checkpoint_id)).files[0].upload_id

    async def _complete(self, checkpoint: Checkpoint, held: Import, digest: str) -> None:
        """Makes the object of its parts, checks its hash and looks at what it is."""
        file = checkpoint.files[0]
        try:
            parts = [(number, etag) for number, (etag, _) in enumerate(held.parts, 1)]
            await self._blobs.complete_multipart(file.key, file.upload_id, parts)
        except BlobNotFound:
            await self._blobs.head(file.key)  # an earlier attempt got this far
        digest = digest or (await self._blobs.digest(file.key)).sha256
        if held.sha256 and digest != held.sha256.lower():
            raise FailedPrecondition(f"the SHA-256 is {digest}, not {held.sha256.lower()}")
        await self._models.keep(checkpoint, file, digest)

    async def _fail(self, held: Import, reason: str) -> None:
        """Ends the import, if it is this attempt's still: another may have followed, and be well.

        Raises:
            Superseded.
        """
        reason = printable(reason)  # it may quote the source
        await self._imports.save_refusal(held, reason)
        log.warning("import refused", checkpoint=str(held.checkpoint_id), reason=reason)

    async def _clean_up(self, checkpoint: Checkpoint) -> None:
        """After a deletion, removes what this attempt had made meanwhile; another attempt's work stays."""
        if not await self._store.find_checkpoints([checkpoint.id]):
            await self._models.delete_objects(checkpoint)
