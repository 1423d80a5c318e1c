"""The main job through REST, with every body and status as contract.md has it."""

from __future__ import annotations

import io
import json
import re
import uuid
from pathlib import Path

import pytest
from PIL import Image

from tests.e2e.conftest import PICTURE, Answer, Api, Studio, create_job, deploy, finished, new_user, upload
from tests.pictures import encoded, mask, noise

TIME = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}$")


def is_uuid(text: str) -> bool:
    return str(uuid.UUID(text)) == text


def test_ping_answers_pong_with_the_legacy_headers(admin: Api) -> None:
    answer = admin.call("GET", "/ping")
    assert (answer.status, answer.body) == (200, {"statusCode": 200, "message": "pong"})
    assert answer.headers["x-api-version"] == "1.5.0"
    assert answer.headers["access-control-allow-origin"] == "*"
    assert answer.headers["content-type"].startswith("application/json")


def test_roles_are_created_replaced_and_listed_by_name_descending(admin: Api) -> None:
    for permissions in (["train:all"], ["train:all", "checkpoint:all"]):
        answer = admin.call("POST", "/roles", {"role_name": "new_role_name", "permissions": permissions})
        assert (answer.status, answer.body) == (201, {"statusCode": 201, "message": "role created"})
    listed = admin.call("GET", "/roles")
    assert listed.body["statusCode"] == 200
    assert listed.body["message"] == "OK"
    assert listed.data["previous_evaluated_key"] == "not_applicable"
    assert listed.data["last_evaluated_key"] is None
    names = [role["role_name"] for role in listed.data["roles"]]
    assert names == sorted(names, reverse=True)
    assert {"byoc", "IT Operator"} <= set(names)
    (role,) = admin.ok("GET", "/roles?role=new_role_name")["roles"]
    assert role == {"role_name": "new_role_name", "creator": "api", "permissions": ["train:all", "checkpoint:all"]}


def test_users_are_created_and_listed_without_their_passwords(admin: Api) -> None:
    answer = admin.call("POST", "/users", {"username": "ann", "password": "hidden", "roles": ["IT Operator"]})
    assert (answer.status, answer.body) == (201, {"statusCode": 201, "message": "Created"})
    data = admin.ok("GET", "/users?username=ann")
    assert data["previous_evaluated_key"] == data["last_evaluated_key"] == "not_applicable"
    (user,) = data["users"]
    assert user["password"] == "********"
    assert user["roles"] == ["IT Operator"]
    assert user["creator"] == "api"
    assert user["permissions"] == sorted(user["permissions"])


def test_the_whole_way_of_an_async_job(studio: Studio) -> None:
    listed = studio.api.ok("GET", "/checkpoints?types=Stable-diffusion&status=Active")
    (item,) = [item for item in listed["checkpoints"] if item["name"] == [studio.model]]
    assert item["s3Location"].endswith(f"/Stable-diffusion/checkpoint/custom/{item['id']}")
    assert item["allowed_roles_or_users"] == ["painter"]
    assert float(item["created"]) > 0
    assert listed["page"] == 1
    assert listed["total"] == len(listed["checkpoints"])

    body = {
        "task_type": "txt2img",
        "inference_type": "Async",
        "models": {"Stable-diffusion": [studio.model], "VAE": ["Automatic"], "embeddings": []},
        "filters": {"createAt": 1707141090.135923, "creator": "sd-webui"},
        "user_id": "painter",
    }
    created = studio.api.call("POST", "/inferences", body)
    assert (created.status, created.body["statusCode"], created.message) == (201, 201, "Created")
    inference = created.data["inference"]
    job_id = inference["id"]
    assert is_uuid(job_id)
    assert inference["type"] == "txt2img"
    assert inference["api_params_s3_location"].endswith(f"/txt2img/infer_v2/{job_id}/api_param.json")
    assert inference["models"] == [
        {"id": item["id"], "name": [studio.model], "type": "Stable-diffusion"},
        {"id": "VAE", "name": ["Automatic"], "type": "VAE"},
    ]
    assert studio.api.ok("GET", f"/inferences/{job_id}")["status"] == "created"

    assert studio.api.put(inference["api_params_s3_upload_url"], json.dumps(PICTURE).encode()).status_code == 200
    started = studio.api.call("PUT", f"/inferences/{job_id}/start")
    assert (started.status, started.message) == (202, "Accepted")
    receipt = started.data["inference"]
    assert receipt["inference_id"] == job_id
    assert receipt["status"] == "inprogress"
    assert receipt["endpoint_name"] == studio.endpoint == "esd-async-studio"
    assert re.search(r"/sagemaker_output/[0-9a-f-]{36}\.out$", receipt["output_path"])

    check_finished(studio.api, finished(studio.api, job_id), "Async", item["id"])
    names = [job["InferenceJobId"] for job in studio.api.ok("GET", "/inferences?limit=0")["inferences"]]
    assert job_id in names


def check_finished(api: Api, job: dict, kind: str, checkpoint_id: str) -> None:
    """Every field of a finished job, the picture and the parameters."""
    job_id = job["InferenceJobId"]
    assert job["status"] == "succeed", job
    assert job["taskType"] == "txt2img"
    assert job["inference_type"] == kind
    assert job["owner_group_or_role"] == ["painter"]
    assert all(TIME.match(job[name]) for name in ("createTime", "startTime", "completeTime"))
    assert job["createTime"] <= job["startTime"] <= job["completeTime"]
    assert job["image_names"] == ["image_0.png"]
    assert job["inference_info_name"] == f"/tmp/{job_id}_param.json"
    assert not {"sagemakerRaw", "payload_string"} & set(job), "unset fields are absent"
    params = job["params"]
    assert params["input_body_s3"].endswith("api_param.json")
    assert params["input_body_presign_url"].startswith(api.url)
    assert params["sagemaker_inference_instance_type"] == "local"
    used = params["used_models"]["Stable-diffusion"][0]
    assert (used["id"], used["model_name"], used["type"]) == (checkpoint_id, "tiny.safetensors", "Stable-diffusion")
    (image_url,) = job["img_presigned_urls"]
    (output_url,) = job["output_presigned_urls"]
    assert image_url.split("?")[0].endswith("/image_0.png")
    assert output_url.split("?")[0].endswith(f"/{job_id}_param.json")
    with Image.open(io.BytesIO(api.get(image_url))) as image:
        assert (image.format, image.size) == ("PNG", (64, 64))
        assert "Steps: 3" in image.text["parameters"]
    written = json.loads(api.get(output_url))
    assert written["inference_id"] == job_id
    assert written["endpoint_name"] == params["sagemaker_inference_endpoint_name"]
    assert written["parameters"]["prompt"] == PICTURE["prompt"]
    assert json.loads(written["info"])["infotexts"][0].startswith("a red circle\n")


@pytest.mark.slow
def test_a_real_time_start_answers_the_finished_job_and_the_same_picture(admin: Api, studio: Studio) -> None:
    async_job = finished(studio.api, start(studio.api, create_job(studio.api, studio.model)))
    admin.ok("POST", "/roles", {"role_name": "quick", "permissions": ["inference:all"]}, 201)
    admin.ok("POST", "/users", {"username": "painter", "password": "p", "roles": ["painter", "quick"]}, 201)
    name = deploy(admin, "quick", "Real-time", "quick")
    job_id = create_job(studio.api, studio.model, "Real-time")
    answer = studio.api.call("PUT", f"/inferences/{job_id}/start")
    assert (answer.status, answer.message) == (200, "OK")
    (checkpoint_id,) = [used["id"] for used in answer.data["params"]["used_models"]["Stable-diffusion"]]
    check_finished(studio.api, answer.data, "Real-time", checkpoint_id)
    assert answer.data["params"]["sagemaker_inference_endpoint_name"] == name == "esd-real-time-quick"
    files = [studio.api.get(job["img_presigned_urls"][0]) for job in (async_job, answer.data)]
    pictures = [Image.open(io.BytesIO(file)).tobytes() for file in files]
    assert pictures[0] == pictures[1], "the same seed gives the same picture on every worker"
    deleted = admin.call("DELETE", "/endpoints", {"endpoint_name_list": [name]})
    assert (deleted.status, deleted.body) == (200, {})
    assert name not in [item["endpoint_name"] for item in admin.ok("GET", "/endpoints?limit=-1")["endpoints"]]


def start(api: Api, job_id: str) -> str:
    """Starts an Async job."""
    api.ok("PUT", f"/inferences/{job_id}/start", status=202)
    return job_id


def test_a_payload_inline_starts_the_job_at_once(studio: Studio) -> None:
    body = {
        "task_type": "txt2img",
        "inference_type": "Async",
        "models": {"Stable-diffusion": [studio.model]},
        "payload_string": json.dumps(PICTURE)[:-1] + ', "s_tmax": Infinity}',
    }
    answer = studio.api.call("POST", "/inferences", body)
    assert (answer.status, answer.message) == (202, "Accepted")
    job = finished(studio.api, answer.data["inference"]["inference_id"])
    assert job["status"] == "succeed", job
    assert "input_body_presign_url" not in job["params"]


def test_a_picture_is_painted_on_through_the_same_routes(studio: Studio) -> None:
    image = noise()
    payload = PICTURE | {"init_images": ["data:image/png;base64," + encoded(image)], "denoising_strength": 0.5}
    payload |= {"mask": encoded(mask((0, 0, 32, 64))), "mask_blur": 0, "inpaint_full_res": False}
    body = {"task_type": "img2img", "inference_type": "Async", "models": {"Stable-diffusion": [studio.model]}}
    inference = studio.api.ok("POST", "/inferences", body, status=201)["inference"]
    for bad in ("aGVsbG8=", "%"):
        studio.api.put(inference["api_params_s3_upload_url"], json.dumps(payload | {"mask": bad}).encode())
        refused = studio.api.call("PUT", f"/inferences/{inference['id']}/start")
        assert refused.status == 400
        assert refused.message.startswith("mask is no")
    studio.api.put(inference["api_params_s3_upload_url"], json.dumps(payload).encode())
    job = finished(studio.api, start(studio.api, inference["id"]))
    assert (job["status"], job["taskType"]) == ("succeed", "img2img"), job
    found = Image.open(io.BytesIO(studio.api.get(job["img_presigned_urls"][0])))
    assert found.crop((32, 0, 64, 64)).tobytes() == image.crop((32, 0, 64, 64)).tobytes()


def test_an_endpoint_shows_what_was_asked_and_what_runs(admin: Api, studio: Studio) -> None:
    (endpoint,) = [
        item
        for item in studio.api.ok("GET", "/endpoints?limit=-1")["endpoints"]
        if item["endpoint_name"] == studio.endpoint
    ]
    assert is_uuid(endpoint["EndpointDeploymentJobId"])
    assert endpoint["endpoint_status"] == "InService"
    assert endpoint["current_instance_count"] == "1"
    assert (endpoint["min_instance_number"], endpoint["max_instance_number"]) == ("0", "1")
    assert (endpoint["status"], endpoint["error"]) == (None, None)
    assert endpoint["owner_group_or_role"] == ["painter"]
    assert TIME.match(endpoint["startTime"])
    assert TIME.match(endpoint["endTime"])
    body = {
        "endpoint_name": "second",
        "instance_type": "ml.g5.2xlarge",
        "initial_instance_count": "1",
        "autoscaling_enabled": False,
        "assign_to_roles": ["painter"],
    }
    refused: Answer = admin.call("POST", "/endpoints", body)
    assert refused.status == 400
    assert refused.message == "role [painter] has a valid endpoint already, not allow to have another one"


def test_another_users_job_and_model_stay_hidden(admin: Api, studio: Studio, tmp_path: Path, checkpoint: Path) -> None:
    job_id = create_job(studio.api, studio.model)
    other = new_user(admin, "stranger", ["inference:all", "checkpoint:all", "sagemaker_endpoint:all"])
    assert other.call("GET", f"/inferences/{job_id}").status == 403
    assert other.call("PUT", f"/inferences/{job_id}/start").status == 403
    assert other.ok("GET", "/inferences?limit=0")["inferences"] == []
    assert other.ok("GET", "/checkpoints")["checkpoints"] == []
    body = {"task_type": "txt2img", "inference_type": "Async", "models": {"Stable-diffusion": [studio.model]}}
    refused = other.call("POST", "/inferences", body)
    assert (refused.status, refused.message) == (400, 'no available Async endpoints for user "stranger"')
    again = upload_name_in_use(other, checkpoint.name)
    assert again.status == 400
    assert "already exists, please use another" in again.message
    other.close()


def upload_name_in_use(api: Api, name: str) -> Answer:
    """Asks to upload a file whose name is taken."""
    body = {
        "checkpoint_type": "Stable-diffusion",
        "filenames": [{"filename": name, "parts_number": 1}],
        "params": {"message": ""},
    }
    return api.call("POST", "/checkpoints", body)


def test_several_parts_make_one_checkpoint(studio: Studio, tmp_path: Path, checkpoint: Path) -> None:
    padded = tmp_path / "vae.bin"
    padded.write_bytes(checkpoint.read_bytes())
    if padded.stat().st_size < 6 * 2**20:
        import safetensors.torch as st
        import torch

        st.save_file({"padding": torch.zeros(3 * 2**20)}, tmp_path / "vae.safetensors")
        padded = tmp_path / "vae.safetensors"
    answer = upload(studio.api, padded, "big.safetensors", "VAE")
    assert answer.status == 200, answer.body
    assert answer.body["checkpoint"] == answer.body["data"]["checkpoint"]
    assert answer.body["checkpoint"]["status"] == "Initial"
    listed = studio.api.ok("GET", "/checkpoints?types=VAE")["checkpoints"]
    assert [item["status"] for item in listed if item["name"] == ["big.safetensors"]] == ["Active"]
