"""Reads what the source of an import answers: the file's name, whether it goes on, what proves that it is the same."""

from __future__ import annotations

import contextlib
import re
from email.message import Message
from pathlib import PurePosixPath
from urllib.parse import unquote

from services.common.errors import InvalidArgument
from services.common.outbound import Answer, Unreachable, Url, UrlRefused
from services.models.checks import file_name

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".onnx", ".yaml")
_MAY_PASS = frozenset({408, 425, 429})
_MAX_DISPOSITION = 2048  # characters: the reading of hostile ones takes the square of their number


def name_in(url: Url) -> str:
    """The name of a model's file at the end of the URL's path; empty where there is none."""
    return _model_name(unquote(url.path))


def name_of(answer: Answer) -> str:
    """The name of what came: as its sender calls it, else as the end of a URL on the way does.

    Raises:
        UrlRefused: none of them is the name of a model's file.
    """
    disposition = answer.headers.get("content-disposition", "")[:_MAX_DISPOSITION]
    disposition = re.sub(r"[^\x20-\x7e\xa0-\xff]", "", disposition)
    header = Message()
    header["Content-Disposition"] = disposition
    extended = re.search(r"(?i);\s*filename\*\s*=\s*utf-8'[^';]*'([^;\s]+)", disposition)  # RFC 6266: it wins
    called = unquote(extended[1]) if extended else header.get_filename() or ""
    names = [_model_name(called), *(name_in(hop) for hop in reversed(answer.hops))]
    name = next((name for name in names if name), None)
    if name is None:
        raise UrlRefused(f"{answer.hops[0].shown} gives no file whose name ends in {', '.join(SUFFIXES)}")
    return name


def check_status(answer: Answer) -> None:
    """Lets an answer pass that has the file, or a part of it.

    Raises:
        Unreachable: it has not, but may another time. UrlRefused.
    """
    shown = answer.hops[-1].shown
    if answer.status in _MAY_PASS or answer.status >= 500:
        raise Unreachable(f"{shown} answers {answer.status}")
    if answer.status not in (200, 206):
        raise UrlRefused(f"{shown} answers {answer.status}")


def first_byte(answer: Answer) -> int | None:
    """Where the part of the file begins that came; None where the answer does not say."""
    found = re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(?:\d{1,18}|\*)", answer.headers.get("content-range", "").strip())
    return int(found[1]) if found else None


def validator_of(answer: Answer) -> str:
    """What proves that the source did not change, a strong ETag or a date of change; empty for nothing that does."""
    etag = answer.headers.get("etag", "")
    found = [etag if etag.startswith('"') else "", answer.headers.get("last-modified", "")]
    return next((text for text in found if text and text.isascii()), "")  # it is sent back, and headers are ASCII


def _model_name(path: str) -> str:
    name = re.split(r"[/\\]", path)[-1].strip()
    if PurePosixPath(name).suffix.lower() in SUFFIXES:
        with contextlib.suppress(InvalidArgument, UnicodeEncodeError):
            return file_name(name)
    return ""
