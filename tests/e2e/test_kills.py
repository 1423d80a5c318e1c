"""Processes die; jobs do not."""

from __future__ import annotations

import os
import signal

import httpx
import psutil
import pytest

from deploy.local.stack import Stack
from tests.e2e.conftest import PICTURE, Api, Studio, create_job, finished, wait_for

SLOW = PICTURE | {"steps": 150}


def workers() -> list[psutil.Process]:
    """The worker processes of this machine's stack under test."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "gpu_worker" in command and process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def test_a_job_whose_worker_is_killed_finishes_once(studio: Studio) -> None:
    job_id = create_job(studio.api, studio.model, payload=SLOW)
    studio.api.ok("PUT", f"/inferences/{job_id}/start", status=202)
    job = studio.api.ok("GET", f"/inferences/{job_id}")
    wait_for(lambda: studio.api.ok("GET", f"/inferences/{job_id}")["startTime"] != job["createTime"])
    for process in workers():
        process.send_signal(signal.SIGKILL)
    job = finished(studio.api, job_id)
    assert job["status"] == "succeed", job
    assert job["image_names"] == ["image_0.png"]
    studio.api.get(job["img_presigned_urls"][0])


PROCESSES = ["postgres", "swift", "identity", "models", "endpoints", "inference", "training", "gateway"]


@pytest.mark.parametrize("name", PROCESSES)
def test_a_killed_process_comes_back_and_jobs_go_on(stack: Stack, studio: Studio, name: str) -> None:
    pid = stack.processes()[name]
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: stack.processes().get(name) not in {None, pid})

    def up_again() -> bool:
        try:
            answers = [studio.api.call("GET", path) for path in ("/ping", "/checkpoints", "/endpoints", "/inferences")]
            training = studio.api.call("GET", "/trainings")
        except httpx.TransportError:
            return False  # the gateway itself is down
        assert all(answer.body is None or "message" in answer.body for answer in answers)
        return {answer.status for answer in answers} == {200} and training.status in {403, 501}

    wait_for(up_again)
    job_id = create_job_when_usable(studio)
    job = finished(studio.api, job_id)
    assert job["status"] == "succeed", job


def create_job_when_usable(studio: Studio) -> str:
    """Creates and starts a job once everything behind the routes is back, too."""

    def created() -> str | None:
        body = {"task_type": "txt2img", "inference_type": "Async", "models": {"Stable-diffusion": [studio.model]}}
        answer = studio.api.call("POST", "/inferences", body)
        return answer.data["inference"]["id"] if answer.status == 201 else None

    wait_for(created)
    job_id = create_job(studio.api, studio.model)
    wait_for(lambda: studio.api.call("PUT", f"/inferences/{job_id}/start").status == 202)
    return job_id


@pytest.mark.parametrize(
    ("name", "path"),
    [("identity", "/roles"), ("models", "/checkpoints"), ("endpoints", "/endpoints"), ("inference", "/inferences")],
)
def test_a_service_that_is_down_is_503_in_the_envelope(stack: Stack, admin: Api, name: str, path: str) -> None:
    process = psutil.Process(stack.processes()[name])
    process.kill()

    def refused() -> httpx.Response | None:
        answer = httpx.get(stack.url + path, headers={"x-api-key": admin.key})
        return answer if answer.status_code == 503 else None

    answer = wait_for(refused)
    assert answer.json()["statusCode"] == 503
    assert answer.headers["x-api-version"] == "1.5.0"
    assert answer.headers["access-control-allow-origin"] == "*"
    wait_for(lambda: admin.call("GET", path).status == 200)
