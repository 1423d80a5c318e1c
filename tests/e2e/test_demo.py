"""The README's first command, and what a user sees when something is wrong with it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from PIL import Image

from deploy.local.ports import free_port


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder that PostgreSQL's user can reach, when root runs this."""
    with tempfile.TemporaryDirectory(prefix="esd-demo-") as folder:
        Path(folder).chmod(0o711)
        yield Path(folder)


def test_the_demo_draws_a_picture_on_both_kinds_of_endpoint_and_leaves_nothing_running(home: Path) -> None:
    command = [sys.executable, "-m", "deploy.local.cli", "demo", "--home", str(home / "home")]
    command += ["--listen", f"127.0.0.1:{free_port()}", "--output", str(home / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for kind in ("async", "real-time"):
        with Image.open(home / "out" / kind / "image_0.png") as picture:
            picture.verify()
        assert list((home / "out" / kind).glob("*_param.json"))
    assert str(home / "out") in ended.stdout.replace("\n", "")
    left = [process for process in psutil.process_iter(["cmdline", "environ"]) if belongs(process, home)]
    assert left == []


def belongs(process: psutil.Process, home: Path) -> bool:
    """Whether a process was started for this home."""
    words = [*(process.info["cmdline"] or []), *(process.info["environ"] or {}).values()]
    return any(str(home) in word for word in words)


def test_a_checkpoint_that_does_not_exist_is_named(home: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "deploy.local.cli",
        "demo",
        "--home",
        str(home / "home"),
        "--checkpoint",
        "/no/such",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode != 0
    assert "/no/such" in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
