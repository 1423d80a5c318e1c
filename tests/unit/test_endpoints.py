"""By what the endpoints service knows a process again."""

import os
import subprocess

from services.endpoints.cluster.process import start_time_of


def test_a_start_time_tells_processes_apart_and_an_ended_one_has_none() -> None:
    child = subprocess.Popen(["/bin/sh", "-c", "read -r _"], stdin=subprocess.PIPE)
    assert start_time_of(child.pid) not in ("", start_time_of(os.getpid()))
    child.communicate()
    assert start_time_of(child.pid) == ""
