"""Says how a worker or task ended, and reads from its log why: one sentence, without tracebacks, for whoever looks at
the endpoint.

Keeps the log of a worker that lives for months from growing for as long.
"""

from __future__ import annotations

import ast
import json
import os
import re
from contextlib import suppress
from pathlib import Path

from services.endpoints.cluster import MAX_FAILURES

_TAIL_BYTES = 16384
_MAX_LOG_BYTES = 64 << 20
_KEPT_LOG_BYTES = 1 << 20
_ERRORS = {"error", "critical"}
# A line of services/common/logs.py on a console: time, level, event, and its values.
_CONSOLE = re.compile(r"^\S+Z \[(?P<level>\w+) *\] (?P<event>.*?)(?P<values>(?: +\w+=.*)?)$")
_REASON = re.compile(r"""\breason=("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|\S+)""")
_SIGNAL_BASE = 128  # an exit code of what a signal ended, by a shell (POSIX, 2.8.2) or a container's runtime
_TRACEBACK = re.compile(r"^(\s|Traceback |\+ |\| |$)")


def how_it_ended(code: int | None) -> str:
    """How a command has ended, in words; None: it was killed together with whoever would have known."""
    if code is None:
        return "was killed"
    if code > _SIGNAL_BASE:
        return f"was ended by signal {code - _SIGNAL_BASE}"
    return f"ended with code {code}"


def why_given_up(code: int | None, words: str) -> str:
    """Why a worker is not started again, by the end of its last process; None where nobody saw its code."""
    how = "ended" if code is None else f"ended with code {code}"
    return f"a worker failed to start {MAX_FAILURES} times in a row; the last one {how}: {words}"


def last_words(log_file: Path) -> str:
    """The last error that was logged; else the last other line that is not of a traceback; else the last message."""
    try:
        end = _end_of(log_file, _TAIL_BYTES)
    except FileNotFoundError:
        end = b""
    return last_words_in(end.decode(errors="replace"))


def shorten(log_file: Path) -> None:
    """Leaves only the end of a log that has become long. Its process, which appends, writes on; what it writes at this
    very moment may be lost.
    """
    with suppress(FileNotFoundError):
        if log_file.stat().st_size > _MAX_LOG_BYTES:
            end = _end_of(log_file, _KEPT_LOG_BYTES)
            os.truncate(log_file, 0)
            with log_file.open("ab") as file:
                file.write(end.partition(b"\n")[2])


def _end_of(file: Path, num_bytes: int) -> bytes:
    with file.open("rb") as opened:
        opened.seek(max(0, opened.seek(0, os.SEEK_END) - num_bytes))
        return opened.read(num_bytes)


def last_words_in(end: str | None) -> str:
    """The same of the end of a log that is known already."""
    lines = [_read(line) for line in (end or "").splitlines() if not _TRACEBACK.match(line)]
    errors = [message for level, message in lines if level in _ERRORS]
    others = [message for level, message in lines if not level]
    for found in (errors, others, [message for _, message in lines]):
        if found:
            return found[-1]
    return "its log is empty"


def _read(line: str) -> tuple[str, str]:
    """Level and message of a line; no level where the worker's logging did not write it."""
    if line.startswith("{"):
        try:
            values = json.loads(line)
            return values["level"], _sentence(values["event"], str(values.get("reason") or ""))
        except (ValueError, KeyError):
            return "", line
    if (match := _CONSOLE.match(line)) is None:
        return "", line
    reason = _REASON.search(match["values"])
    return match["level"], _sentence(match["event"], _unquoted(reason[1]) if reason and reason[1] != "None" else "")


def _unquoted(value: str) -> str:
    return str(ast.literal_eval(value)) if value[0] in "\"'" else value


def _sentence(event: str, reason: str) -> str:
    words = f"{event.strip()}: {reason}" if reason else event.strip()
    return words.partition("\n")[0]
