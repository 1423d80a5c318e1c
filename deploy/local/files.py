"""Owns how files are written that must be there, and whole, even if the power goes in the next moment."""

import os
from pathlib import Path


def write_durably(file: Path, text: str) -> None:
    """Replaces the file at once and keeps it to this user."""
    part = file.with_name(f".{file.name}.{os.getpid()}")
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as output:
        output.write(text)
        output.flush()
        os.fsync(output.fileno())  # else the name may reach the disk before the content does
    rename_durably(part, file)


def rename_durably(part: Path, whole: Path) -> None:
    """Gives a file or folder whose content is on the disk its name."""
    part.rename(whole)
    folder = os.open(whole.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
