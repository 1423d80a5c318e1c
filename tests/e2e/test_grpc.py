"""A program of another team that calls the services by gRPC: the one in protos/README.md, line by line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.e2e.conftest import Studio
from tests.processes import ROOT


def blocks(language: str) -> str:
    """The code of the README in one language."""
    text = (ROOT / "protos" / "README.md").read_text()
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))


@pytest.mark.slow
def test_the_readmes_commands_make_stubs_with_which_its_program_draws_a_picture(studio: Studio, tmp_path: Path) -> None:
    (tmp_path / "esd").symlink_to(ROOT / "esd")  # of which only the descriptors are looked at
    commands = [line for line in blocks("bash").replace("\\\n", "").splitlines() if not line.startswith("pip ")]
    script = "\n".join(commands).replace("python -m", f"{sys.executable} -m")
    subprocess.run(["bash", "-ec", script], cwd=tmp_path, check=True)
    (tmp_path / "esd").unlink()
    (tmp_path / "stubs" / "program.py").write_text(blocks("python"))
    # The stubs are all that it has of this project.
    elsewhere = f"import sys, runpy; sys.path.remove({str(ROOT)!r}); runpy.run_path('program.py')"
    arguments = [urlsplit(studio.api.url).netloc, studio.api.key, studio.model]
    program = [sys.executable, "-c", elsewhere, *arguments]
    told = subprocess.run(program, cwd=tmp_path / "stubs", capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    lines = told.stdout.splitlines()
    assert lines[-2] == "done"
    assert re.fullmatch(r"succeed \d+ bytes", lines[-1])
