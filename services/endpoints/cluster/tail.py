"""Reads from a worker's log why it ended: one sentence, without tracebacks, for whoever looks at the endpoint."""

from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path

_TAIL_BYTES = 16384
_ERRORS = {"error", "critical"}
# A line of services/common/logs.py on a console: time, level, event, and its values.
_CONSOLE = re.compile(r"^\S+Z \[(?P<level>\w+) *\] (?P<event>.*?)(?P<values>(?: +\w+=.*)?)$")
_REASON = re.compile(r"""\breason=("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|\S+)""")
_TRACEBACK = re.compile(r"^(\s|Traceback |\+ |\| |$)")


def last_words(log_file: Path) -> str:
    """The last error that was logged; else the last other line that is not of a traceback; else the last message.

    Empty where there is no log, or nothing in it.
    """
    try:
        with log_file.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            end = file.read(_TAIL_BYTES)
    except FileNotFoundError:
        return ""
    return last_words_in(end.decode(errors="replace"))


def last_words_in(end: str) -> str:
    """The same of the end of a log that is known already."""
    lines = [_read(line) for line in end.splitlines() if not _TRACEBACK.match(line)]
    errors = [message for level, message in lines if level in _ERRORS]
    others = [message for level, message in lines if not level]
    for found in (errors, others, [message for _, message in lines]):
        if found:
            return found[-1]
    return ""


def _read(line: str) -> tuple[str, str]:
    """Level and message of a line; no level where the worker's logging did not write it."""
    if line.startswith("{"):
        try:
            values = json.loads(line)
            return values["level"], _sentence(values["event"], str(values.get("reason", "")))
        except (ValueError, KeyError):
            return "", line
    if (match := _CONSOLE.match(line)) is None:
        return "", line
    reason = _REASON.search(match["values"])
    return match["level"], _sentence(match["event"], _unquoted(reason[1]) if reason else "")


def _unquoted(value: str) -> str:
    return str(ast.literal_eval(value)) if value[0] in "\"'" else value


def _sentence(event: str, reason: str) -> str:
    words = f"{event.strip()}: {reason}" if reason else event.strip()
    return words.partition("\n")[0]
