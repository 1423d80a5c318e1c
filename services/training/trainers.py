"""The trainers' side of trainings: what they are to train on, URLs when they need them, and what they tell.

A trainer uploads to its session's own folder. What it tells of is read back and copied to the training's output, so a
trainer that was given up can change nothing there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from uuid import UUID

from services.common.blobs import Blob, BlobNotFound, Blobs
from services.common.errors import FailedPrecondition, InvalidArgument, NotFound
from services.common.payloads.trainers import is_plain
from services.training import facts
from services.training.rows import Training
from services.training.trainer_store import TrainerStore

BASE, PICTURE, REGULARISATION, STATE, UPLOAD = "base", "picture", "regularisation", "state", "upload"
_MAX_FILES = 100_000  # of a dataset
# What a trainer may upload, below its folder.
_UPLOADS = re.compile(r"[^/]+\.safetensors|state-\d+\.pt|sample/[^/]+\.png|logs/[^/]+/[^/]+|logs/[^/]+")


@dataclass(frozen=True)
class Welcome:
    """A training as its trainer is told of it, and the files of its datasets by their names there."""

    training: Training
    pictures: list[tuple[str, int]]
    regularisation: list[tuple[str, int]]


class Trainers:
    """What trainers may do, each with its own training only."""

    def __init__(self, store: TrainerStore, blobs: Blobs) -> None:
        self._store = store
        self._blobs = blobs

    async def welcome(self, training_id: UUID, session: UUID) -> Welcome:
        """Gives the training to a trainer; one that had it before is not heard any more.

        Raises:
            NotFound: it is gone. TakenOver: another one has it since. FailedPrecondition: it has ended, or its dataset
            has too many files.
        """
        training = await self._store.take(training_id, session)
        if training is None:
            raise NotFound(f"training {training_id} is gone")
        if training.is_ended and not (training.is_leaving and training.session == session):
            raise FailedPrecondition(f"training {training_id} has ended: it is {training.outcome}")
        return Welcome(
            training,
            await self._files(training.dataset_prefix),
            await self._files(training.regularisation_prefix) if training.regularisation_prefix else [],
        )

    def urls(self, training: Training, session: UUID, kind: str, names: list[str]) -> list[str]:
        """URLs for an hour, in the order of the names.

        Raises:
            InvalidArgument: a name is none that a trainer may ask for.
        """
        return [self._url(training, session, kind, name) for name in names]

    async def record(self, training: Training, session: UUID, sequence: int, fact: facts.Fact) -> Training:
        """Keeps what a trainer tells.

        Raises:
            TakenOver: the training is another trainer's. FailedPrecondition: it has ended, or a file is not what was
            told.
        """
        if isinstance(fact, facts.Saved | facts.Preview | facts.Board):
            await self._keep(training, session, fact.file)
        elif isinstance(fact, facts.Kept):
            await self._check(training, session, fact.file)
        kept = await self._store.record(training.id, session, sequence, fact)
        if kept is None:
            raise _has_ended(training)
        if isinstance(fact, facts.Removed) and _is_network(fact.name):
            await self._blobs.delete(training.output_prefix + fact.name)
        return kept

    async def _files(self, prefix: str) -> list[tuple[str, int]]:
        """Names and sizes of the objects below a dataset's prefix."""
        found: list[Blob] = await self._blobs.find(prefix)
        if len(found) > _MAX_FILES:
            raise FailedPrecondition(f"the dataset has {len(found)} files; at most {_MAX_FILES} are possible")
        named = [(blob.key.removeprefix(prefix), blob.size_bytes) for blob in found]
        return [(name, size_bytes) for name, size_bytes in named if is_plain(name)]

    def _url(self, training: Training, session: UUID, kind: str, name: str) -> str:
        if kind == UPLOAD:
            if not _UPLOADS.fullmatch(name) or not is_plain(name):
                raise InvalidArgument(f"{name!r} is no file that a trainer uploads")
            return self._blobs.presign_put(training.session_prefix(session) + name)
        if kind == BASE:
            return self._blobs.presign_get(training.base["key"])
        if kind == STATE and training.state:
            return self._blobs.presign_get(training.state["key"])
        prefixes = {PICTURE: training.dataset_prefix, REGULARISATION: training.regularisation_prefix}
        prefix = prefixes.get(kind)
        if not prefix or not is_plain(name):
            raise InvalidArgument(f"there is no {kind} {name!r}")
        return self._blobs.presign_get(prefix + name)

    async def _keep(self, training: Training, session: UUID, file: facts.Uploaded) -> None:
        """Copies a file that was uploaded to the output, if it is what was told."""
        await self._check(training, session, file)
        # Another trainer may have come while that took its time, and have saved a file of the name.
        if not await self._store.hears(training.id, session):
            raise _has_ended(training)
        await self._blobs.copy(training.session_prefix(session) + file.name, training.output_prefix + file.name)

    async def _check(self, training: Training, session: UUID, file: facts.Uploaded) -> None:
        if not is_plain(file.name):
            raise FailedPrecondition(f"{file.name!r} cannot be the name of a file")
        try:
            found = await self._blobs.digest(training.session_prefix(session) + file.name)
        except BlobNotFound:
            raise FailedPrecondition(f"{file.name} was not uploaded") from None
        if (found.size_bytes, found.sha256) != (file.size_bytes, file.sha256):
            raise FailedPrecondition(f"{file.name} is not in the store as it was uploaded")


def _has_ended(training: Training) -> FailedPrecondition:
    return FailedPrecondition(f"training {training.id} has ended")


def _is_network(name: str) -> bool:
    return is_plain(name) and "/" not in name and name.endswith(".safetensors")
