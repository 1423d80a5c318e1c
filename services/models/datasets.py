"""Decides about datasets: who may see and change them, and where their files lie.

The files of a dataset lie in `dataset/<name>[/<prefix>]/`; with the prefix `<repeats>_<concept>` that is the folder
which the trainer reads (contract 12.3).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import structlog

from services.common.blobs import DAY, HOUR, Blobs
from services.common.errors import InvalidArgument, Unavailable
from services.common.paging import KeyNames, make_key, parse_key, parse_limit
from services.common.structs import check_params
from services.common.viewer import Viewer
from services.models.checks import file_name, first_repeated, folder
from services.models.dataset_store import (
    Dataset,
    DatasetHidden,
    DatasetItem,
    DatasetNotFound,
    DatasetStore,
    KeptName,
)

log = structlog.get_logger()

UPLOAD_URL_SECONDS = 7 * DAY
PREVIEW_URL_SECONDS = DAY
# Of the params of each file: a dataset of ten thousand is shown as a whole.
_MAX_ITEM_BYTES = 4 * 1024
_MAX_ITEM_VALUES = 20
_KEY_NAMES = KeyNames("dataset_name", "timestamp")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,19}")
_KEEP = timedelta(seconds=UPLOAD_URL_SECONDS + HOUR)  # a PUT that begins in time may end later
_EMPTYING = timedelta(minutes=10)  # for one folder; one request to the store may take minutes before it fails


@dataclass(frozen=True)
class NewItem:
    """A file that a client wants to upload."""

    filename: str
    name: str
    type: str
    params: dict[str, Any]


class Datasets:
    """Datasets, in the object store and in the tables."""

    def __init__(self, store: DatasetStore, blobs: Blobs) -> None:
        self._store = store
        self._blobs = blobs

    def s3_location(self, dataset: Dataset) -> str:
        """The folder of the dataset's files, `s3://…`."""
        return self._blobs.url(_folder(dataset.name, dataset.prefix).rstrip("/"))

    async def list_datasets(
        self, viewer: Viewer, status: str, limit: str, start_key: str
    ) -> tuple[list[Dataset], str | None]:
        """A page of datasets, newest first, and the key of the next one.

        Raises:
            InvalidArgument: a bad limit or key.
        """
        after = parse_key(_KEY_NAMES, start_key, _name)
        rows, more = await self._store.page_datasets(viewer, status, after, parse_limit(limit))
        return rows, make_key(_KEY_NAMES, rows[-1].name, rows[-1].created_at) if more else None

    async def create_dataset(
        self, creator: Viewer, name: str, prefix: str, files: Sequence[NewItem], params: dict[str, Any]
    ) -> dict[str, str]:
        """Adds a dataset, or files to an existing one, and answers a PUT URL for each file name.

        Raises:
            InvalidArgument: a name that cannot be a file's or folder's, one given twice, or params that are too large.
            DatasetHidden: somebody else has a dataset of this name. DatasetNameKept: had one lately.
            DatasetEmptied: one is being deleted. DatasetFull: there are too many files.
        """
        check_params(params)
        now = datetime.now(UTC)
        owners = list(creator.roles) or [creator.name]
        dataset = Dataset(name=name, prefix=folder(prefix), owners=owners, created_at=now, params=params)
        items = []
        for position, file in enumerate(files):
            check_params(file.params, f"content[{position}].params", _MAX_ITEM_BYTES, _MAX_ITEM_VALUES)
            key = _folder(name, dataset.prefix) + file_name(file.filename)
            item = DatasetItem(
                dataset_name=name, key=key, position=position, name=file.name, type=file.type, created_at=now, params={}
            )
            item.params = {"original_file_name": file.filename} | file.params
            items.append(item)
        keys = [item.key for item in items]
        if twice := first_repeated(keys):
            raise InvalidArgument(f"content: {twice.rpartition('/')[2]} is given more than once")
        await self._store.save_dataset(dataset, items, creator)
        urls = await asyncio.to_thread(lambda: [self._blobs.presign_put(key, UPLOAD_URL_SECONDS) for key in keys])
        return {file.filename: url for file, url in zip(files, urls, strict=True)}

    async def get_dataset(self, viewer: Viewer, name: str) -> tuple[Dataset, list[tuple[DatasetItem, str]]]:
        """The dataset and its files, each with a URL that shows it for a day.

        Raises:
            DatasetNotFound, DatasetHidden.
        """
        dataset, items = await self._store.get_dataset(name)
        _check_owner(viewer, dataset)
        keys = [item.key for item in items]
        urls = await asyncio.to_thread(lambda: [self._blobs.presign_get(key, PREVIEW_URL_SECONDS) for key in keys])
        return dataset, list(zip(items, urls, strict=True))

    async def resolve_dataset(self, viewer: Viewer, name: str) -> str:
        """The prefix of all keys of the dataset.

        Raises:
            DatasetNotFound: there is none of the name, or the viewer may not see it.
        """
        found = await self._store.find_datasets([name])
        if not any(viewer.sees(dataset.owners) for dataset in found):
            raise DatasetNotFound(name)
        return _folder(name)

    async def update_status(self, viewer: Viewer, name: str, status: str) -> None:
        """Sets the status of a dataset and of all its files.

        Raises:
            DatasetNotFound, DatasetHidden.
        """
        for dataset in await self._store.find_datasets([name]):
            _check_owner(viewer, dataset)
        await self._store.save_status(name, status)

    async def delete_datasets(self, viewer: Viewer, names: Sequence[str]) -> None:
        """Deletes datasets with all their objects; unknown names are skipped.

        Rows go first, so that nobody adds files to a folder that is being emptied.

        Raises:
            DatasetHidden: one is somebody else's; none is deleted then.
        """
        found = await self._store.find_datasets(names)
        for dataset in found:
            _check_owner(viewer, dataset)
        removed = await self._store.remove_datasets([dataset.name for dataset in found], _KEEP, _EMPTYING)
        await asyncio.gather(*(self._empty(kept) for kept in removed))

    async def empty_folders(self) -> None:
        """Empties the folders of deleted datasets whose names become free, and those where a deletion was cut short.

        To be done now and then: whoever had a URL may have uploaded into a folder after it was emptied.
        """
        while kept := await self._store.claim_name(_EMPTYING):
            await self._empty(kept)

    async def _empty(self, kept: KeptName) -> None:
        """What cannot be done now is done when the name is claimed again."""
        is_free = kept.until <= datetime.now(UTC)
        try:
            async with asyncio.timeout(_EMPTYING.total_seconds() / 2):
                await self._blobs.delete_prefix(_folder(kept.name))
        except (Unavailable, TimeoutError) as error:
            log.warning("the folder of a deleted dataset waits to be emptied", dataset=kept.name, reason=str(error))
            return
        await self._store.save_emptied(kept, is_free)


def _name(text: str) -> str:
    """The name of a dataset, as a key of a list has it."""
    if not _NAME.fullmatch(text):
        raise ValueError
    return text


def _folder(name: str, prefix: str = "") -> str:
    return f"dataset/{name}/{prefix}/" if prefix else f"dataset/{name}/"


def _check_owner(viewer: Viewer, dataset: Dataset) -> None:
    if not viewer.sees(dataset.owners):
        raise DatasetHidden
