"""Checks requests beyond what their proto can say. Pure functions; each names field and value where it refuses."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.common.errors import InvalidArgument
from services.models.rows import CheckpointFile

MAX_NAME_BYTES = 255  # of a file on the worker's disk
_MAX_NUMBERS = 10  # of parts that a sentence lists
_UNSEEN = {"Cc", "Cf"}  # controls and formats: a terminal obeys some, others turn a name's reading around
_NOT_IN_XML = "\ufffe\uffff"  # with one in a key, the object store lists no uploads any more


@dataclass(frozen=True)
class Tag:
    """An uploaded part; `etag` is without quotes."""

    part_number: int
    etag: str


def file_name(filename: str) -> str:
    """The name that a file is kept under: without spaces around it.

    Raises:
        InvalidArgument: it cannot be a file's name.
    """
    name = filename.strip()
    if name in {"", ".", ".."}:
        raise InvalidArgument(f'filename "{filename}" cannot be the name of a file')
    _check_seen("filename", name)
    if len(name.encode()) > MAX_NAME_BYTES:
        raise InvalidArgument(
            f'filename "{name}" is too long: {len(name.encode())} bytes, {MAX_NAME_BYTES} are allowed'
        )
    return name


def folder(prefix: str) -> str:
    """A relative folder, without slashes around it; empty for none.

    Raises:
        InvalidArgument: it cannot be a folder's name.
    """
    path = prefix.strip().strip("/")
    if not path:
        return ""
    parts = path.split("/")
    if any(part.strip() in {"", ".", ".."} for part in parts) or "\\" in path:
        raise InvalidArgument(f'prefix "{prefix}" cannot be the name of a folder')
    _check_seen("prefix", path)
    if len(path.encode()) > MAX_NAME_BYTES:
        raise InvalidArgument(f'prefix "{path}" is too long: {len(path.encode())} bytes, {MAX_NAME_BYTES} are allowed')
    return path


def first_repeated(names: Sequence[str]) -> str | None:
    """The first of the names that is there more than once; None where each is there once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def complete_parts(file: CheckpointFile, tags: Sequence[Tag]) -> list[tuple[int, str]]:
    """(number, ETag) of all parts of the file, in order.

    Raises:
        InvalidArgument: the tags are not exactly those of the file's parts.
    """
    expected = set(range(1, file.parts_number + 1))
    numbers = [tag.part_number for tag in tags]
    if missing := sorted(expected - set(numbers)):
        raise InvalidArgument(f"{file.name}: the tags of {_numbers(missing)} of {file.parts_number} are missing")
    if unknown := sorted(set(numbers) - expected):
        raise InvalidArgument(f"{file.name}: there is no {_numbers(unknown)}, the upload has {file.parts_number}")
    if twice := sorted(number for number, count in Counter(numbers).items() if count > 1):
        raise InvalidArgument(f"{file.name}: {_numbers(twice)} is given more than once")
    return sorted((tag.part_number, tag.etag) for tag in tags)


def stored_parts(name: str, parts: Sequence[tuple[int, str]], stored: Mapping[int, str]) -> list[tuple[int, str]]:
    """The parts of a file with their ETags as the object store spells them: some clients change letters' case.

    Raises:
        InvalidArgument: the store has no such part, or another.
    """
    for number, etag in parts:
        if number not in stored:
            raise InvalidArgument(f"{name}: part {number} was not uploaded")
        if stored[number].lower() != etag.lower():
            raise InvalidArgument(f"{name}: {etag} is not the ETag of the uploaded part {number}")
    return [(number, stored[number]) for number, _ in parts]


def _check_seen(field: str, name: str) -> None:
    if any(unicodedata.category(character) in _UNSEEN or character in _NOT_IN_XML for character in name):
        raise InvalidArgument(f"{field} {name!a} cannot be a name: it has characters that nobody sees")


def _numbers(numbers: list[int]) -> str:
    more = f" and {len(numbers) - _MAX_NUMBERS} more" if len(numbers) > _MAX_NUMBERS else ""
    return f"part{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:_MAX_NUMBERS]))}{more}"
