"""Every mistake of a user is one clear sentence that names the field and the value, and leaves nothing behind."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import PICTURE, Answer, Api, Studio, create_job, finished, new_user, upload

NOBODY = "5b47fc8f-c1b0-47ad-9d85-ad0f08526e28"  # an id of the right form


def refused_start(studio: Studio, payload: Any) -> Answer:
    """Starts a job with a bad payload; the job must stay as it was."""
    job_id = create_job(studio.api, studio.model, payload=payload)
    answer = studio.api.call("PUT", f"/inferences/{job_id}/start")
    assert answer.status == 400, answer.body
    assert answer.body["statusCode"] == 400
    assert "Traceback" not in answer.message
    assert studio.api.ok("GET", f"/inferences/{job_id}")["status"] == "created"
    return answer


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sampler_name": "Euler b"}, ["sampler_name", "Euler b", "Euler a"]),
        ({"width": 32}, ["width", "32", "64 to 4096"]),
        ({"height": 5000}, ["height", "5000", "64 to 4096"]),
        ({"steps": 0}, ["steps", "0"]),
        ({"steps": 100000}, ["steps", "100000"]),
        ({"steps": "many"}, ["steps", "many"]),
        ({"batch_size": 1000}, ["batch_size", "1000"]),
    ],
)
def test_a_wrong_value_in_the_payload_is_named(studio: Studio, change: dict[str, Any], words: list[str]) -> None:
    message = refused_start(studio, PICTURE | change).message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"not json", "JSON"),
        (b"[1, 2]", "object"),
        (b'{"prompt": NaN}', "NaN"),
        (b"\xff\xfe\x00", "JSON"),
        (b"", "empty"),
    ],
)
def test_a_payload_that_is_no_json_object_is_refused(studio: Studio, content: bytes, word: str) -> None:
    assert word in refused_start(studio, content).message


def test_a_payload_that_was_never_uploaded_is_named(studio: Studio) -> None:
    body = {"task_type": "txt2img", "inference_type": "Async", "models": {"Stable-diffusion": [studio.model]}}
    job_id = studio.api.ok("POST", "/inferences", body, 201)["inference"]["id"]
    answer = studio.api.call("PUT", f"/inferences/{job_id}/start")
    assert answer.status == 400
    assert "upload" in answer.message
    assert studio.api.ok("GET", f"/inferences/{job_id}")["status"] == "created"


def test_a_payload_replaced_after_the_start_has_no_effect(studio: Studio) -> None:
    body = {"task_type": "txt2img", "inference_type": "Async", "models": {"Stable-diffusion": [studio.model]}}
    created = studio.api.ok("POST", "/inferences", body, 201)["inference"]
    url = created["api_params_s3_upload_url"]
    studio.api.put(url, json.dumps(PICTURE).encode())
    studio.api.ok("PUT", f"/inferences/{created['id']}/start", status=202)
    studio.api.put(url, json.dumps(PICTURE | {"prompt": "a blue square", "steps": 0}).encode())
    job = finished(studio.api, created["id"])
    assert job["status"] == "succeed", job
    written = json.loads(studio.api.get(job["output_presigned_urls"][0]))
    assert written["parameters"]["prompt"] == PICTURE["prompt"]


def test_an_unknown_checkpoint_is_named_with_its_type(studio: Studio) -> None:
    models = {"Stable-diffusion": ["nowhere.safetensors"], "VAE": ["none.pt"]}
    body = {"task_type": "txt2img", "inference_type": "Async", "models": models}
    answer = studio.api.call("POST", "/inferences", body)
    assert answer.status == 400
    assert "checkpoint with name nowhere.safetensors, type Stable-diffusion is not found" in answer.message
    assert "checkpoint with name none.pt, type VAE is not found" in answer.message


def test_a_caller_without_an_endpoint_is_told_so(studio: Studio) -> None:
    body = {"task_type": "txt2img", "inference_type": "Real-time", "models": {"Stable-diffusion": [studio.model]}}
    answer = studio.api.call("POST", "/inferences", body)
    assert answer.status == 400
    assert answer.message == 'no available Real-time endpoints for user "painter"'


def test_an_unknown_task_type_is_answered_with_the_possible_ones(studio: Studio) -> None:
    body = {"task_type": "paint", "inference_type": "Async", "models": {}}
    answer = studio.api.call("POST", "/inferences", body)
    assert answer.status == 400
    assert "task type paint should be in" in answer.message


@pytest.mark.parametrize("job_id", ["no-uuid", "%00", NOBODY])
def test_an_unknown_or_impossible_job_id_is_not_found(studio: Studio, job_id: str) -> None:
    answer = studio.api.call("GET", f"/inferences/{job_id}")
    assert answer.status in ({404, 400} if job_id == "%00" else {404}), answer.body
    assert studio.api.call("PUT", f"/inferences/{job_id}/start").status == 400


@pytest.mark.parametrize("checkpoint_id", ["no-uuid", NOBODY])
def test_an_unknown_or_impossible_checkpoint_id_is_not_found(studio: Studio, checkpoint_id: str) -> None:
    answer = studio.api.call("PUT", f"/checkpoints/{checkpoint_id}", {"status": "Active", "multi_parts_tags": {}})
    assert answer.status == 404
    assert answer.message == f"checkpoint not found with id {checkpoint_id}"


@pytest.mark.parametrize("parts", [0, 101, "x", None, 1.5])
def test_a_bad_part_count_is_refused_and_no_row_appears(admin: Api, parts: Any) -> None:
    before = admin.ok("GET", "/checkpoints?per_page=1000")["total"]
    body = {
        "checkpoint_type": "VAE",
        "filenames": [{"filename": "parts.safetensors", "parts_number": parts}],
        "params": {},
    }
    answer = admin.call("POST", "/checkpoints", body)
    assert answer.status == 400
    if isinstance(parts, int):
        assert "parts_number" in answer.message
        assert str(parts) in answer.message
    assert admin.ok("GET", "/checkpoints?per_page=1000")["total"] == before


def test_a_wrong_etag_is_named_and_the_upload_can_still_be_completed(admin: Api, checkpoint: Path) -> None:
    body = {
        "checkpoint_type": "VAE",
        "filenames": [{"filename": "etag.safetensors", "parts_number": 1}],
        "params": {"message": ""},
    }
    opened = admin.ok("POST", "/checkpoints", body, 201)
    (url,) = opened["s3PresignUrl"]["etag.safetensors"]
    etag = admin.put(url, checkpoint.read_bytes()).headers["etag"]
    path = f"/checkpoints/{opened['checkpoint']['id']}"

    def complete(tag: str) -> Answer:
        tags = {"etag.safetensors": [{"ETag": tag, "PartNumber": 1}]}
        return admin.call("PUT", path, {"status": "Active", "multi_parts_tags": tags})

    wrong = complete('"0123456789abcdef0123456789abcdef"')
    assert wrong.status == 400
    assert "etag.safetensors" in wrong.message
    assert complete(etag).status == 200
    assert complete(etag).status == 200, "completion is idempotent"


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.path, "w"))


def test_a_pickle_with_code_is_refused_and_never_executed(admin: Api, tmp_path: Path) -> None:
    mark, evil = tmp_path / "executed", tmp_path / "evil.ckpt"
    with zipfile.ZipFile(evil, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"state_dict": Evil(str(mark))}))
        archive.writestr("archive/version", "3")
    answer = upload(admin, evil)
    assert answer.status == 400, answer.body
    assert "evil.ckpt" in answer.message
    assert not mark.exists()
    active = admin.ok("GET", "/checkpoints?status=Active&per_page=1000")["checkpoints"]
    assert not [item for item in active if item["name"] == ["evil.ckpt"]]


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "huge header"])
def test_a_damaged_checkpoint_is_refused_by_name(admin: Api, tmp_path: Path, checkpoint: Path, damage: str) -> None:
    content = checkpoint.read_bytes()
    damaged = {
        "truncated": content[: len(content) // 2],
        "garbage": b"\x07" * 1000,
        "empty": b"",
        "huge header": struct.pack("<Q", 2**40) + content[8:],
    }[damage]
    path = tmp_path / f"{damage.replace(' ', '-')}.safetensors"
    path.write_bytes(damaged)
    answer = upload(admin, path)
    assert answer.status == 400, answer.body
    assert path.name in answer.message


def test_missing_fields_are_listed_as_the_legacy_api_lists_them(admin: Api) -> None:
    answer = admin.call("POST", "/roles", {})
    assert answer.status == 400
    assert answer.message == '[object has missing required properties (["permissions","role_name"])]'
    assert admin.call("POST", "/roles", {"role_name": "", "permissions": ["train:all"]}).status == 400


def test_a_user_without_the_permission_is_told_which_is_missing(admin: Api) -> None:
    reader = new_user(admin, "reader", ["checkpoint:list"])
    answer = reader.call("GET", "/roles")
    assert answer.status == 403
    assert answer.message == "User reader has no permissions: ['role:all', 'role:list']"
    assert reader.call("POST", "/roles", {}).status == 400, "a bad body comes before a missing permission"
    reader.close()
