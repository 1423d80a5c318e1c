"""How a running job ends before its time: cancelled, or at its deadline. Through the gateway, on a worker."""

from __future__ import annotations

import json
import uuid

import pytest

from deploy.local.stack import Stack
from tests.e2e.conftest import PICTURE, Studio, create_job, finished, wait_for

LONG = PICTURE | {"steps": 150, "n_iter": 4}


def test_a_running_job_is_cancelled_and_the_worker_goes_on_with_the_next(studio: Studio) -> None:
    api = studio.api
    job_id = create_job(api, studio.model, payload=LONG)
    api.ok("PUT", f"/inferences/{job_id}/start", status=202)

    def is_running() -> bool:
        job = api.ok("GET", f"/inferences/{job_id}")
        assert job["status"] == "inprogress"
        return bool(job["startTime"] != job["createTime"])

    wait_for(is_running)
    answer = api.call("PUT", f"/inferences/{job_id}/cancel")
    assert (answer.status, answer.body["statusCode"], answer.message) == (200, 200, "OK")
    assert answer.data["status"] == "failed"
    assert answer.data["sagemakerRaw"] == "the job was cancelled by painter"
    assert answer.data["params"]["cancelled"] is True
    next_id = create_job(api, studio.model)
    api.ok("PUT", f"/inferences/{next_id}/start", status=202)
    done = finished(api, next_id)
    assert done["status"] == "succeed"
    assert len(done["params"]["results"][0]["sha256"]) == 64
    too_late = api.call("PUT", f"/inferences/{next_id}/cancel")
    assert (too_late.status, too_late.message) == (
        400,
        f"inference {next_id} has ended already: its status is succeed",
    )
    unknown = uuid.uuid4()
    missing = api.call("PUT", f"/inferences/{unknown}/cancel")
    assert (missing.status, missing.message) == (404, f"inference with id {unknown} not found")
    assert [job["InferenceJobId"] for job in api.ok("GET", "/inferences?status=failed")["inferences"]].count(job_id)


@pytest.mark.slow
def test_a_deadline_stops_a_running_job_on_its_worker(stack: Stack, studio: Studio) -> None:
    """The worker's own log tells; a job of so many steps would go on for long."""
    first_id = create_job(studio.api, studio.model)
    studio.api.ok("PUT", f"/inferences/{first_id}/start", status=202)
    finished(studio.api, first_id)  # there is a worker, and it has the model
    endless = PICTURE | {"steps": 150, "n_iter": 64}
    body = {"task_type": "txt2img", "inference_type": "Async", "models": {"Stable-diffusion": [studio.model]}}
    body |= {"payload_string": json.dumps(endless), "deadline_seconds": 12}
    job_id = studio.api.ok("POST", "/inferences", body, 202)["inference"]["inference_id"]
    assert finished(studio.api, job_id)["sagemakerRaw"].startswith("the deadline passed: ")

    def has_stopped() -> bool:
        lines = (line for log in stack.home.rglob("worker-*.log") for line in log.read_text().splitlines())
        return any(job_id in line and "job ended" in line and "the job was cancelled" in line for line in lines)

    wait_for(has_stopped)
