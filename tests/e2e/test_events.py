"""A real job as somebody sees it who watches."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
from PIL import Image

from tests.e2e.conftest import PICTURE, Api, Studio, create_job


def events(api: Api, job_id: str) -> Iterator[dict[str, Any]]:
    """The events of a job to their end."""
    path, headers = f"{api.url}/inferences/{job_id}/events", {"x-api-key": api.key}
    with httpx.stream("GET", path, headers=headers, timeout=120) as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        for line in answer.iter_lines():
            if line:
                yield json.loads(line.removeprefix("data: "))


def test_a_watched_job_shows_itself_from_its_creation_to_its_picture(studio: Studio) -> None:
    job_id = create_job(studio.api, studio.model, payload=PICTURE | {"steps": 60})
    told = events(studio.api, job_id)
    assert next(told) == {"created": {}}
    studio.api.ok("PUT", f"/inferences/{job_id}/start", status=202)
    rest = list(told)
    names = [name for event in rest for name in event if name != "ping"]
    assert names[-2:] == ["image", "done"]
    steps = [event["step"]["step"] for event in rest if "step" in event]
    assert steps == sorted(steps)
    assert {event["step"]["numSteps"] for event in rest if "step" in event} == {60}
    preview = next(event["preview"] for event in rest if "preview" in event)
    assert Image.open(io.BytesIO(base64.b64decode(preview["jpeg"]))).size == (8, 8)
    (image,) = [event["image"] for event in rest if "image" in event]
    assert Image.open(io.BytesIO(studio.api.get(image["url"]))).size == (64, 64)
    assert [next(iter(event)) for event in events(studio.api, job_id)] == ["image", "done"]


def test_watching_ends_when_the_key_is_revoked(studio: Studio, admin: Api) -> None:
    made = admin.ok("POST", "/keys", {"username": "painter"}, 201)
    told = events(Api(studio.api.url, made["key"]), create_job(studio.api, studio.model))
    assert next(told) == {"created": {}}
    admin.ok("DELETE", "/keys", {"key_id_list": [made["id"]]}, 204)
    assert {name for event in told for name in event} <= {"ping"}, "the stream ends though the job never does"
