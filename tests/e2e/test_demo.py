"""The README's first command, and what a user sees when something is wrong with it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import ssl
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from deploy.local.ports import free_port
from gpu_worker import demo_model
from gpu_worker.demo_model.judge import is_right
from gpu_worker.demo_model.scenes import Scene
from tests.gateway.test_start import make_certificate
from tests.processes import ROOT


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder that PostgreSQL's user can reach, when root runs this."""
    with tempfile.TemporaryDirectory(prefix="esd-demo-") as folder:
        Path(folder).chmod(0o711)
        yield Path(folder)


def make_demo(home: Path, port: int, *options: str, **variables: str) -> subprocess.Popen[str]:
    """Starts `make demo` as a terminal does: in a process group of its own."""
    arguments = ["--home", f"{home}/home", "--listen", f"127.0.0.1:{port}", "--output", f"{home}/out", *options]
    return subprocess.Popen(
        ["make", "--no-print-directory", "demo", f"ARGS={' '.join(arguments)}"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "400", **variables},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def processes_of(home: Path) -> list[psutil.Process]:
    """The processes that were started for this home."""

    def belongs(process: psutil.Process) -> bool:
        words = [*(process.info["cmdline"] or []), *(process.info["environ"] or {}).values()]
        return any(str(home) in word for word in words)

    return [process for process in psutil.process_iter(["cmdline", "environ"]) if belongs(process)]


def assert_pictures(home: Path, prompt: str) -> None:
    """Both kinds of endpoint have left a picture of the prompt and its description."""
    for kind in ("async", "real-time"):
        with Image.open(home / "out" / kind / "image_0.png") as picture:
            picture.verify()
        (described,) = (home / "out" / kind).glob("*_param.json")
        assert prompt in json.dumps(json.loads(described.read_text()), ensure_ascii=False)


@pytest.mark.slow
def test_the_demo_draws_a_picture_on_both_kinds_of_endpoint_and_leaves_nothing_running(home: Path) -> None:
    port = free_port()
    demo = make_demo(home, port, http_proxy="http://127.0.0.1:1")  # which is not asked
    said, _ = demo.communicate(timeout=300)
    assert demo.returncode == 0, said
    assert_pictures(home, demo_model.PROMPT)
    for kind in ("async", "real-time"):
        with Image.open(home / "out" / kind / "image_0.png") as picture:
            assert is_right(np.asarray(picture), Scene("circle", "red", "blue"))
    assert "uploading demo-sd15.safetensors ━" in said  # the progress bar
    assert "is active (4 parts)" in said
    # Where the pictures are, the URL, and how to go on.
    assert f"files in {home}/out" in said
    assert f"\nthe API was at http://127.0.0.1:{port}; `esd up` keeps it there" in said
    assert said.endswith(", and `esd status` shows the first key's file\n")
    assert processes_of(home) == []


@pytest.mark.slow
def test_ones_own_checkpoint_and_prompt_and_a_stack_that_is_kept_behind_a_self_made_certificate(home: Path) -> None:
    checkpoint, prompt = home / "my own.safetensors", """an "owl's" nest; $HOME"""
    shutil.copy(demo_model.CHECKPOINT, checkpoint)
    certificate, key = make_certificate(home)
    files = {"ESD_TLS_CERT_FILE": str(certificate), "ESD_TLS_KEY_FILE": str(key)}
    address = f"localhost:{free_port()}"
    options = ("--listen", address, "--keep", "--size", "64")
    demo = make_demo(home, 0, *options, CHECKPOINT=str(checkpoint), PROMPT=prompt, **files)
    assert demo.stdout is not None
    said = ""
    while "keeps running" not in said:
        line = demo.stdout.readline()
        assert line, said
        said += line
    assert "checkpoint my own.safetensors is active (1 part)" in said
    assert_pictures(home, json.dumps(prompt)[1:-1])
    assert "cannot reach" not in (home / "home" / "stack.log").read_text(), "workers trust it too"
    first_key = (home / "home" / "secrets" / "api-key").read_text().strip()
    trusting = ssl.create_default_context(cafile=certificate)
    ping = httpx.get(f"https://{address}/ping", headers={"x-api-key": first_key}, verify=trusting)
    assert ping.status_code == 200
    os.killpg(demo.pid, signal.SIGINT)  # Ctrl-C
    rest, _ = demo.communicate(timeout=300)
    assert "stopped" in rest
    assert processes_of(home) == []


def test_a_checkpoint_that_does_not_exist_is_named(home: Path) -> None:
    demo = make_demo(home, free_port(), CHECKPOINT="/no/such")
    said, _ = demo.communicate(timeout=300)
    assert demo.returncode != 0
    assert "--checkpoint /no/such: there is no such file" in said
    assert "Traceback" not in said
