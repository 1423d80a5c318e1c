"""Names, counts and process identities of the endpoints service."""

import os
import subprocess

import pytest

from services.endpoints.cluster.process import start_time_of
from services.endpoints.domain import full_name


@pytest.mark.parametrize(
    ("endpoint_type", "name", "expected"),
    [("Async", "test", "esd-async-test"), ("Real-time", "", "esd-real-time-620f9d8")],
)
def test_a_full_name_has_the_type_and_the_name_or_the_beginning_of_the_id(
    endpoint_type: str, name: str, expected: str
) -> None:
    assert full_name(endpoint_type, name, "620f9d8e-0000-4000-8000-000000000000") == expected


def test_a_start_time_tells_processes_apart_and_an_ended_one_has_none() -> None:
    child = subprocess.Popen(["/bin/sh", "-c", "read -r _"], stdin=subprocess.PIPE)
    assert start_time_of(child.pid) not in ("", start_time_of(os.getpid()))
    child.communicate()
    assert start_time_of(child.pid) == ""
