"""What the training service and its trainers hold each other to, beside the contract."""

from __future__ import annotations

MAX_POINTS = 1000  # of one progress


def is_plain(name: str) -> bool:
    """Whether a file's name is a path downwards."""
    parts = name.split("/")
    return all(part not in {"", ".", ".."} for part in parts) and "\\" not in name and "\0" not in name
