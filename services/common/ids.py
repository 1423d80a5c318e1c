"""Ids of rows, as clients send them back."""

from __future__ import annotations

from uuid import UUID


def parse_id(text: str) -> UUID | None:
    """The id, if the text is one in the form that the services give out."""
    try:
        parsed = UUID(text)
    except ValueError:
        return None
    return parsed if str(parsed) == text.lower() else None
