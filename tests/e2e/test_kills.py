"""Processes die; jobs do not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import httpx
import psutil
import pytest

from deploy.local.stack import Stack
from tests.e2e.conftest import PICTURE, Answer, Api, Studio, create_job, finished, wait_for

SLOW = PICTURE | {"steps": 100}


def workers(stack: Stack) -> list[psutil.Process]:
    """The worker processes of the stack under test."""
    below = psutil.Process(stack.launcher_pid).children(recursive=True)
    return [process for process in below if "gpu_worker" in process.cmdline()]


@pytest.mark.slow
def test_a_job_whose_worker_is_killed_finishes_once(stack: Stack, studio: Studio) -> None:
    job_id = create_job(studio.api, studio.model, payload=SLOW)
    studio.api.ok("PUT", f"/inferences/{job_id}/start", status=202)
    job = studio.api.ok("GET", f"/inferences/{job_id}")
    wait_for(lambda: studio.api.ok("GET", f"/inferences/{job_id}")["startTime"] != job["createTime"])
    killed = workers(stack)
    assert killed
    for process in killed:
        process.send_signal(signal.SIGKILL)
    job = finished(studio.api, job_id)
    assert job["status"] == "succeed", job
    assert job["image_names"] == ["image_0.png"]
    studio.api.get(job["img_presigned_urls"][0])


@pytest.mark.slow
def test_a_job_whose_worker_falls_silent_is_taken_from_it_and_finishes_once(stack: Stack, studio: Studio) -> None:
    def count() -> str:
        endpoints = studio.api.ok("GET", "/endpoints")["endpoints"]
        return str(next(row for row in endpoints if row["endpoint_name"] == studio.endpoint)["current_instance_count"])

    job_id = create_job(studio.api, studio.model, payload=PICTURE | {"steps": 60})
    studio.api.ok("PUT", f"/inferences/{job_id}/start", status=202)
    job = studio.api.ok("GET", f"/inferences/{job_id}")
    wait_for(lambda: studio.api.ok("GET", f"/inferences/{job_id}")["startTime"] != job["createTime"])
    stopped = workers(stack)
    assert stopped
    try:
        for process in stopped:
            process.send_signal(signal.SIGSTOP)  # its connections stay open, and nobody answers on them
        wait_for(lambda: count() == "0", seconds=35)
        assert studio.api.ok("GET", f"/inferences/{job_id}")["status"] == "inprogress"
    finally:
        for process in stopped:
            process.send_signal(signal.SIGCONT)
    job = finished(studio.api, job_id)
    assert (job["status"], job["image_names"]) == ("succeed", ["image_0.png"])
    wait_for(lambda: count() == "1")


PATHS = {"identity": "/roles", "models": "/checkpoints", "endpoints": "/endpoints", "inference": "/inferences"}
PROCESSES = ["postgres", "swift", *PATHS, "training", "gateway"]


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSES)
def test_a_killed_process_comes_back_and_a_job_under_way_ends_well(stack: Stack, studio: Studio, name: str) -> None:
    """Meanwhile a service's routes are 503 in the envelope."""
    job_id = create_job(studio.api, studio.model, payload=SLOW)
    studio.api.ok("PUT", f"/inferences/{job_id}/start", status=202)
    pid = stack.processes()[name]
    os.kill(pid, signal.SIGKILL)
    if name in PATHS:
        refused = wait_for(lambda: unavailable(studio.api, PATHS[name]))
        assert refused.body["statusCode"] == 503
        assert refused.headers["x-api-version"] == "1.5.0"
        assert refused.headers["access-control-allow-origin"] == "*"
    wait_for(lambda: stack.processes().get(name) not in {None, pid})
    wait_for(lambda: is_up(studio.api))
    job = finished(studio.api, job_id)
    assert job["status"] == "succeed", job
    studio.api.get(job["img_presigned_urls"][0])


def unavailable(api: Api, path: str) -> Answer | None:
    """What the path answers, once that is 503."""
    answer = api.call("GET", path)
    return answer if answer.status == 503 else None


def is_up(api: Api) -> bool:
    """Whether every service answers; until then each answer must be an envelope, or no answer at all."""
    try:
        answers = [api.call("GET", path) for path in ("/ping", "/checkpoints", "/endpoints", "/inferences")]
        training = api.call("GET", "/trainings")
    except httpx.TransportError:
        return False  # the gateway itself is down
    assert all("message" in answer.body for answer in answers)
    return {answer.status for answer in answers} == {200} and training.status == 403


@pytest.mark.slow
def test_after_everything_was_killed_at_once_the_demo_can_be_repeated(stack: Stack, studio: Studio) -> None:
    before = stack.processes()
    for process in [psutil.Process(pid) for pid in before.values()]:
        process.kill()
    wait_for(lambda: not set(stack.processes().values()) & set(before.values()))
    wait_for(lambda: len(stack.processes()) == len(before) and is_up(studio.api))
    command = [sys.executable, "-m", "deploy.local.cli", "demo", "--home", str(stack.home)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
