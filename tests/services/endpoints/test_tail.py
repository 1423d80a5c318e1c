"""Why a worker ended, out of logs that the platform's own logging wrote."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.endpoints.cluster.process import Processes
from services.endpoints.cluster.tail import last_words, shorten
from services.endpoints.rows import Worker

WORKER = """
import logging, sys, structlog
from services.common import logs
from services.common.settings import Settings

logs.configure("worker", Settings(log_format=sys.argv[1]))
log = structlog.get_logger()
log.info("the engine starts", device="cuda")
"""
RAISE = "raise ValueError('no such\\nthing')"


@pytest.mark.parametrize("log_format", ["console", "json"])
@pytest.mark.parametrize(
    ("code", "words"),
    [
        (
            "log.error('the engine cannot start', device='cuda', reason=\"it's not\\nhere\")",
            "the engine cannot start: it's not",
        ),
        ("log.error('short', reason='here')", "short: here"),
        ("log.info('job ended', reason=None)", "job ended"),
        (f"try:\n    {RAISE}\nexcept ValueError:\n    log.exception('job failed', job_id=3)", "job failed"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("sys.exit('setting ESD_DEVICE: Field required')", "setting ESD_DEVICE: Field required"),
        ("", "the engine starts"),
    ],
)
def test_the_last_words_are_one_sentence_without_traceback(
    tmp_path: Path, log_format: str, code: str, words: str
) -> None:
    with (tmp_path / "log").open("wb") as log:
        subprocess.run([sys.executable, "-c", WORKER + code, log_format], stderr=log, check=False)
    assert last_words(tmp_path / "log") == words


def test_of_a_long_log_only_the_end_is_read(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        log.truncate(1 << 40)  # more than fits into memory
        log.seek(0, 2)
        log.write(b"\nthe end\n")
    assert last_words(tmp_path / "log") == "the end"


async def test_a_long_log_is_shortened_while_its_process_writes_on(tmp_path: Path) -> None:
    log, before, gate = (tmp_path / name for name in ("log", "before", "gate"))
    before.write_bytes(b"a line\n" * (10 << 20))  # 70 MiB
    os.mkfifo(gate)
    has_ended = asyncio.Event()
    script = 'cat "$1"; read -r go <"$2"; echo the end'
    command = ["/bin/sh", "-c", script, "sh", str(before), str(gate)]
    worker = Worker(endpoint_id="an endpoint", slot=0)
    await Processes(has_ended.set).start(worker, _claim, command, {}, log)
    with gate.open("w") as opened:  # waits for the process, which then has written all of it
        shorten(log)
        shorten(log)  # which is short
        opened.write("go\n")
    await asyncio.wait_for(has_ended.wait(), 30)
    lines = log.read_bytes().splitlines()
    assert (set(lines[:-1]), lines[-1]) == ({b"a line"}, b"the end")
    assert log.stat().st_size <= (1 << 20) + len("the end\n")


def test_a_log_that_is_not_there_is_an_empty_one(tmp_path: Path) -> None:
    assert last_words(tmp_path / "log") == "its log is empty"


async def _claim(worker: Worker) -> bool:
    return True
