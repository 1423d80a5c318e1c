"""`make install`, with a stand-in for Python that notes what it is asked for."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.processes import ROOT

# Like Python it makes a .venv with itself inside, which has a pip unless $NO_ENSUREPIP is set.
PYTHON = """#!/bin/sh
echo "$@" >> "$ASKED"
case "$*" in
"-m venv --clear "*)
    rm -rf "$4" && mkdir -p "$4/bin" && cp "$0" "$4/bin/python" && test -z "$NO_ENSUREPIP" && touch "$4/pip";;
*pip*) test -e "$(dirname "$0")/../pip";;
esac
"""


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path / "venv"


def install(venv: Path, **variables: str) -> tuple[int, list[str]]:
    """The exit status of `make install`, and the arguments of the Pythons that it ran."""
    asked = venv.with_name("asked")
    asked.write_text("")
    command = ["make", "install", f"VENV={venv}", f"PYTHON={venv.with_name('python')}"]
    environment = {**os.environ, "ASKED": str(asked), **variables}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False, timeout=60)
    return done.returncode, asked.read_text().splitlines()


def makes_anew(asked: list[str]) -> bool:
    return any(words.startswith("-m venv --clear") for words in asked)


def test_an_installation_is_made_once(venv: Path) -> None:
    status, asked = install(venv)
    assert (status, makes_anew(asked), asked[-1][:14]) == (0, True, "-m pip install")
    assert install(venv) == (0, ["-c import pip"])


def test_an_environment_that_got_no_pip_is_made_anew(venv: Path) -> None:
    """As by Debian's python3 without python3-venv."""
    assert install(venv, NO_ENSUREPIP="1")[0] != 0
    assert (venv / "bin" / "python").exists()
    status, asked = install(venv)
    assert (status, makes_anew(asked)) == (0, True)


def test_an_environment_whose_python_was_replaced_is_made_anew(venv: Path) -> None:
    install(venv)
    (venv / "pip").unlink()  # another version of Python looks for its packages in another folder
    status, asked = install(venv)
    assert (status, makes_anew(asked)) == (0, True)
