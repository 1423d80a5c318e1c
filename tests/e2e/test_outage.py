"""The object store says nothing for longer than anybody's patience; jobs wait for it."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest

from deploy.local.stack import Stack
from gpu_worker.models import tiny
from tests.e2e.conftest import PICTURE, Studio, create_job, finished, upload, wait_for


@pytest.mark.slow
def test_a_store_that_is_silent_for_more_than_a_minute_costs_no_job(
    stack: Stack, studio: Studio, tmp_path: Path
) -> None:
    api, model = studio.api, tmp_path / "not-fetched-yet.safetensors"
    tiny.write(model, seed=2)
    assert upload(api, model).status == 200
    starting = create_job(api, studio.model)
    painting = create_job(api, studio.model, payload=PICTURE | {"steps": 60})
    api.ok("PUT", f"/inferences/{painting}/start", status=202)
    job = api.ok("GET", f"/inferences/{painting}")
    wait_for(lambda: api.ok("GET", f"/inferences/{painting}")["startTime"] != job["createTime"])
    swift = psutil.Process(stack.processes()["swift"])
    swift.suspend()  # its connections stay open, and nobody answers on them
    try:
        body = {
            "task_type": "txt2img",
            "inference_type": "Async",
            "models": {"Stable-diffusion": [model.name]},
            "payload_string": json.dumps(PICTURE),
        }
        fetching = api.ok("POST", "/inferences", body, 202)["inference"]["inference_id"]
        refused = api.call("PUT", f"/inferences/{starting}/start")
        assert (refused.status, refused.message) == (
            503,
            "the object store does not answer at present; try again later",
        )
        wait_for(lambda: any("job postponed" in line and fetching in line for line in said(stack)))
        assert {api.ok("GET", f"/inferences/{one}")["status"] for one in (painting, fetching)} == {"inprogress"}
    finally:
        swift.resume()
    api.ok("PUT", f"/inferences/{starting}/start", status=202)
    for one in (starting, painting, fetching):
        job = finished(api, one)
        assert (job["status"], job["image_names"]) == ("succeed", ["image_0.png"]), job
        api.get(job["img_presigned_urls"][0])
    # What was painted while the store was away was kept, not painted again.
    assert not [line for line in said(stack) if "job postponed" in line and painting in line]


def said(stack: Stack) -> list[str]:
    """The log of the stack's services."""
    return stack.log_file.read_text(errors="replace").splitlines()
