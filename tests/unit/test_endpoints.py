"""Names, counts and process identities of the endpoints service."""

import os
import subprocess

import pytest

from services.endpoints.cluster.process import start_time_of
from services.endpoints.domain import full_name
from services.endpoints.reconcile import desired_workers
from services.endpoints.store import Endpoint


@pytest.mark.parametrize(
    ("endpoint_type", "name", "expected"),
    [("Async", "test", "esd-async-test"), ("Real-time", "", "esd-real-time-620f9d8")],
)
def test_a_full_name_has_the_type_and_the_name_or_the_beginning_of_the_id(
    endpoint_type: str, name: str, expected: str
) -> None:
    assert full_name(endpoint_type, name, "620f9d8e-0000-4000-8000-000000000000") == expected


@pytest.mark.parametrize(
    ("status", "autoscaling", "bounds", "num_queued", "expected"),
    [
        ("Creating", False, (2, 0, 1), 0, 2),
        ("InService", False, (2, 0, 1), 9, 2),
        ("Failed", False, (2, 0, 1), 9, 0),
        ("Deleting", True, (2, 1, 3), 9, 0),
        ("InService", True, (2, 0, 3), 0, 2),
        ("InService", True, (5, 0, 3), 0, 3),
        ("InService", True, (1, 2, 3), 0, 2),
    ],
)
def test_the_desired_number_of_workers_stays_within_its_bounds(
    status: str, autoscaling: bool, bounds: tuple[int, int, int], num_queued: int, expected: int
) -> None:
    initial, low, high = bounds
    endpoint = Endpoint(status=status, autoscaling=autoscaling, num_initial=initial, num_min=low, num_max=high)
    assert desired_workers(endpoint, num_queued) == expected


def test_a_start_time_tells_processes_apart_and_an_ended_one_has_none() -> None:
    child = subprocess.Popen(["/bin/sh", "-c", "read -r _"], stdin=subprocess.PIPE)
    assert start_time_of(child.pid) not in ("", start_time_of(os.getpid()))
    child.communicate()
    assert start_time_of(child.pid) == ""
