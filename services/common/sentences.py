"""Makes words of what a file, a source or a worker says fit to be kept, told and shown."""

from __future__ import annotations

MAX_SENTENCE = 500  # characters
MAX_REASON = 4000  # characters of one that may list what is possible


def printable(text: str, max_characters: int = MAX_SENTENCE) -> str:
    """The text without what a terminal obeys, no database takes or no message carries, and not longer than that."""
    beginning = text[: max_characters + 1]
    shown = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in beginning)
    return shown if len(shown) <= max_characters else f"{shown[: max_characters - 1]}…"
