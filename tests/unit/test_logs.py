"""Logs never show what a secret variable held."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import structlog
from services.common import logs
from services.common.settings import Settings

logs.configure("test", Settings(log_format={form!r}))

def fails(password):
    raise ValueError("no such thing")

try:
    fails("hidden-" + "value")
except ValueError as error:
    structlog.get_logger().error("rpc failed", exc_info=error)
"""


def test_a_traceback_in_the_log_shows_no_local_variables() -> None:
    for form in ("console", "json"):
        program = [sys.executable, "-c", PROGRAM.format(form=form)]
        ended = subprocess.run(program, capture_output=True, text=True, check=True)
        assert "no such thing" in ended.stderr
        assert "hidden-value" not in ended.stderr
