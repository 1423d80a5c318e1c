"""ESD_HOME: its secrets last, and other users see none."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path

import pytest

from deploy.local.home import Home, HomeDamagedError


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_secrets_are_made_once(tmp_path: Path) -> None:
    first = {file.name: file.read_text() for file in Home(tmp_path).secrets.iterdir()}
    assert {file.name: file.read_text() for file in Home(tmp_path).secrets.iterdir()} == first
    assert set(map(len, first.values())).isdisjoint({0})


def test_folders_are_closed_again(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    assert mode(home.path) == (0o711 if os.geteuid() == 0 else 0o700)
    for folder in (home.secrets, home.run, home.worker, home.swift):
        folder.chmod(0o755)
    Home(tmp_path / "home")
    assert {mode(folder) for folder in (home.secrets, home.run, home.worker, home.swift)} == {0o700}


def test_an_empty_secret_is_named(tmp_path: Path) -> None:
    """What a loss of power leaves of a file that was not synced; and it must open no door."""
    file = Home(tmp_path).api_key_file
    file.write_text("")
    with pytest.raises(HomeDamagedError, match=f"{file} is empty"):
        Home(tmp_path)


def test_what_follows_from_secrets_follows_when_they_change(tmp_path: Path) -> None:
    home = Home(tmp_path)
    public = home.verifying_key_file.read_text()
    home.signing_key_file.unlink()
    (home.secrets / "models.secret").write_text("another")
    changed = Home(tmp_path)
    assert changed.verifying_key_file.read_text() != public
    hashes = json.loads(changed.secret_hashes_file.read_text())
    assert hashes["models"] == hashlib.sha256(b"another").hexdigest()
