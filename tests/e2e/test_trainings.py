"""A training as its user sees it: from pictures to a LoRA that can be prompted."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from deploy.local.stack import Stack
from tests.e2e.conftest import PICTURE, Api, Studio, finished, upload, wait_for
from tests.e2e.school import School, add_dataset, open_school, path_of
from tests.gpu_worker import tiny_sdxl
from tests.pictures import circle
from tests.services.models.files import safetensors

# Several processes start one after the other, each of which imports torch.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="session")
def school(admin: Api, studio: Studio) -> Iterator[School]:
    """A user who shares the painter's role."""
    admin.ok("POST", "/roles", {"role_name": "tutor", "permissions": ["train:all"]}, 201)
    admin.ok("POST", "/users", {"username": "tutor", "password": "secret", "roles": ["tutor", "painter"]}, 201)
    api = Api(admin.url, admin.ok("POST", "/keys", {"username": "tutor"}, 201)["key"])
    yield open_school(api, studio.model)
    api.close()


def draw(school: School, prompt: str, loras: list[str]) -> bytes:
    """The picture of a prompt, with LoRAs among the job's models."""
    body = {
        "task_type": "txt2img",
        "inference_type": "Async",
        "models": {"Stable-diffusion": [school.model], "Lora": loras},
    }
    created = school.api.ok("POST", "/inferences", body, 201)["inference"]
    payload = json.dumps(PICTURE | {"prompt": prompt}).encode()
    assert school.api.put(created["api_params_s3_upload_url"], payload).status_code == 200
    school.api.ok("PUT", f"/inferences/{created['id']}/start", status=202)
    job = finished(school.api, created["id"])
    assert job["status"] == "succeed", job
    return school.api.get(job["img_presigned_urls"][0])


def test_a_training_shows_how_far_it_is_and_ends_as_a_lora_that_can_be_prompted(school: School) -> None:
    answer = school.post(output_name="zog")
    assert (answer.status, answer.message, answer.data["status"]) == (200, "OK", "Training")
    training_id = answer.data["id"]
    assert answer.data["output_location"].endswith(f"/kohya/train/{training_id}/output")
    assert answer.data["params"]["config_params"]["training"]["max_train_epochs"] == 2, "numbers as they were sent"

    told = list(school.events(training_id))
    assert told[-1]["ended"]["status"] == "Completed", told[-1]
    assert [event["saved"]["name"] for event in told if "saved" in event] == [
        "zog-000001.safetensors",
        "zog.safetensors",
    ]
    step = [event["step"] for event in told if "step" in event][-1]
    assert (step["step"], step["numSteps"], step["epoch"], step["numEpochs"]) == (16, 16, 2, 2)
    assert set(step["learningRates"]) == {"unet", "text"}
    preview = [event["preview"] for event in told if "preview" in event][-1]
    assert (preview["epoch"], preview["prompt"]) == (2, "a zog")
    assert Image.open(io.BytesIO(school.api.get(preview["url"]))).size == (64, 64)
    assert any("16 steps" in event["log"]["line"] for event in told if "log" in event)

    assert school.steps(training_id) == list(range(1, 17))
    ended = school.get(training_id)
    assert (ended["job_status"], ended["checkpoint_id"]) == ("Completed", training_id)
    (listed,) = [row for row in school.api.ok("GET", "/trainings")["trainings"] if row["id"] == training_id]
    assert listed["params"]["config_params"]["saving_arguments"]["output_name"] == "zog"

    row = school.checkpoint(training_id)
    assert row is not None
    assert (row["status"], row["name"]) == ("Active", ["zog.safetensors", "zog-000001.safetensors"])
    assert row["s3Location"] == answer.data["output_location"]
    plain = draw(school, "a zog", ["zog.safetensors"])
    assert draw(school, "a zog <lora:zog:1>", ["zog.safetensors"]) != plain, "it acts"


def test_a_training_on_sdxl_ends_as_a_lora_of_all_its_parts(school: School, tmp_path: Path) -> None:
    checkpoint = tiny_sdxl.make(tmp_path / "tiny-xl.safetensors").path
    assert upload(school.api, checkpoint).status == 200
    xl = replace(school, model=checkpoint.name, model_path=path_of(school.api, checkpoint.name))
    answer = xl.post({"fm_type": "sd_xl"}, output_name="zog-xl")
    assert answer.status == 200, answer.body
    told = list(xl.events(answer.data["id"]))
    assert told[-1]["ended"]["status"] == "Completed", told[-1]
    assert Image.open(io.BytesIO(xl.api.get(next(e["preview"]["url"] for e in told if "preview" in e)))).size == (
        64,
        64,
    )
    row = xl.checkpoint(answer.data["id"])
    assert row is not None
    assert (row["status"], row["name"]) == ("Active", ["zog-xl.safetensors", "zog-xl-000001.safetensors"])
    plain = draw(xl, "a zog", ["zog-xl.safetensors"])
    assert draw(xl, "a zog <lora:zog-xl:1>", ["zog-xl.safetensors"]) != plain, "it acts"
    assert draw(xl, "a zog <lora:zog-xl:1:0>", ["zog-xl.safetensors"]) != plain, "so do the text encoders' parts alone"


def trainers(stack: Stack) -> list[psutil.Process]:
    """The trainers of the stack under test."""
    below = psutil.Process(stack.launcher_pid).children(recursive=True)
    return [process for process in below if is_trainer(process)]


def is_trainer(process: psutil.Process) -> bool:
    """Whether it is one, and has not ended since it was listed."""
    try:
        return process.cmdline()[-2:] == ["gpu_worker", "train"]
    except psutil.NoSuchProcess:
        return False


def kill_service(stack: Stack, school: School) -> None:
    """Kills the training service, and waits until it is back."""
    psutil.Process(stack.processes()["training"]).kill()
    wait_for(lambda: school.api.call("GET", "/trainings").status == 200)


def saved(told: Iterator[dict[str, Any]]) -> str:
    """The name of the next network that is saved."""
    name: str = next(event["saved"]["name"] for event in told if "saved" in event)
    return name


def test_what_cannot_be_had_is_refused_before_anything_begins(school: School, admin: Api) -> None:
    add_dataset(admin, "secret", {"0.png": circle(0)})
    others = school.data_path.replace("/zogs", "/secret")
    for given, keys, sentence in (
        ({"fm_type": "sd_2"}, {}, "Invalid fm_type sd_2, the valid values are sd_1_5 and sd_xl"),
        ({"s3_data_path": others}, {}, f'Dataset not found: s3_data_path "{others}" names no dataset that you may use'),
        ({"s3_model_path": "s3://elsewhere/a.safetensors"}, {}, "Model not found: s3_model_path"),
        ({}, {"network_dim": "many"}, 'network_dim "many": input should be a valid integer'),
    ):
        answer = school.post(given, output_name="never", **keys)
        assert (answer.status, answer.message[: len(sentence)]) == (400, sentence)
    assert not [row for row in school.api.ok("GET", "/checkpoints?types=Lora&per_page=100")["checkpoints"]
                if row["name"] == ["never.safetensors"]]  # fmt: skip


def test_what_turns_out_to_be_impossible_is_a_failed_training_with_the_reason(
    school: School, admin: Api, tmp_path: Path
) -> None:
    (tmp_path / "odd.safetensors").write_bytes(safetensors())
    assert upload(school.api, tmp_path / "odd.safetensors").status == 200
    begun = {
        f"fm_type is sd_xl, but {school.model} is a Stable Diffusion 1.5 checkpoint": {"fm_type": "sd_xl"},
        "odd.safetensors": {"s3_model_path": path_of(school.api, "odd.safetensors")},
    }
    ids = {}
    for number, (sentence, given) in enumerate(begun.items()):
        answer = school.post(given, output_name=f"impossible-{number}")
        assert answer.status == 200, answer.body
        ids[sentence] = answer.data["id"]
    for sentence, training_id in ids.items():
        ended = school.until(training_id)
        assert ended["job_status"] == "Failed"
        assert sentence in ended["params"]["resp"]["error_msg"]
        assert "Traceback" not in ended["params"]["resp"]["error_msg"]
        wait_for(lambda training_id=training_id: (school.checkpoint(training_id) or {})["status"] == "Disabled")


def test_a_killed_trainer_and_service_come_back_and_go_on_after_the_last_epoch(stack: Stack, school: School) -> None:
    several = {"optimizer_args": ["weight_decay=0.01", "eps=1e-8", "betas=0.9,0.99"]}  # which come in any order
    training_id = school.begin(
        output_name="tough", max_train_epochs=28, save_every_n_epochs=4, sample_every_n_epochs=0, **several
    )
    told = school.events(training_id)
    while saved(told) != "tough-000008.safetensors":
        pass  # the state after an earlier epoch is kept before that
    for process in trainers(stack):
        process.kill()
    told = school.events(training_id)
    assert any("going on after epoch" in event.get("log", {}).get("line", "") for event in told)
    survivors = trainers(stack)
    assert survivors
    kill_service(stack, school)
    heard = len(school.steps(training_id))
    wait_for(lambda: len(school.steps(training_id)) > heard)
    assert trainers(stack) == survivors, "a trainer goes on without the service, and tells it when it is back"
    for process in trainers(stack):
        process.kill()
    kill_service(stack, school)
    ended = school.until(training_id)
    assert ended["job_status"] == "Completed", ended
    assert school.steps(training_id) == list(range(1, 225)), "no step is missing or told twice"
    row = school.checkpoint(training_id)
    assert row is not None
    assert (row["name"][0], len(row["name"])) == ("tough.safetensors", 7)


def test_a_third_death_of_its_trainer_ends_a_training_that_keeps_what_it_saved(stack: Stack, school: School) -> None:
    training_id = school.begin(output_name="doomed", max_train_epochs=100_000, sample_every_n_epochs=0)
    assert saved(school.events(training_id)) == "doomed-000001.safetensors"
    for _ in range(3):
        heard = len(school.steps(training_id))
        wait_for(lambda heard=heard: len(school.steps(training_id)) > heard)
        killed = trainers(stack)
        assert killed
        for process in killed:
            process.kill()
        psutil.wait_procs(killed, timeout=60)
    ended = school.until(training_id)
    assert ended["job_status"] == "Failed"
    assert ended["params"]["resp"]["error_msg"].startswith("the trainer failed: ")
    wait_for(lambda: (school.checkpoint(training_id) or {})["status"] != "Initial")
    kept = school.checkpoint(training_id)
    assert kept is not None
    assert (kept["status"], kept["name"][-1]) == ("Active", "doomed-000001.safetensors")
    assert trainers(stack) == []


def test_a_stop_acts_within_a_step_or_while_it_waits_and_what_was_saved_stays(stack: Stack, school: School) -> None:
    first = school.begin(output_name="endless", max_train_epochs=100_000, sample_every_n_epochs=0)
    waiting = school.begin(output_name="waiting")
    assert saved(school.events(first)) == "endless-000001.safetensors"
    reason = next(event["status"].get("reason") for event in school.events(waiting) if "status" in event)
    assert reason, "it says what it waits for, as one trains at a time"
    for training_id in (waiting, first):
        assert school.api.call("PUT", f"/trainings/{training_id}/stop").body == {"statusCode": 200, "message": "OK"}
        assert school.get(training_id)["job_status"] == "Stopped"
    assert list(school.events(first))[-1]["ended"]["status"] == "Stopped"
    wait_for(lambda: not trainers(stack))
    kept, empty = school.checkpoint(first), school.checkpoint(waiting)
    assert kept is not None
    assert empty is not None
    assert (kept["status"], kept["name"][-1]) == ("Active", "endless-000001.safetensors")
    assert empty["status"] == "Disabled"
    assert school.api.call("DELETE", "/trainings", {"training_id_list": [first, waiting]}).status == 204
    assert school.api.call("GET", f"/trainings/{first}").status == 404
    assert draw(school, "a zog <lora:endless-000001:1>", ["endless-000001.safetensors"]), "a checkpoint has it"


@pytest.mark.parametrize("stages", [("Starting",), ("Downloading", "Training")], ids=["starting", "begun"])
def test_a_stop_acts_before_the_first_step_too(stack: Stack, school: School, stages: tuple[str, ...]) -> None:
    training_id = school.begin(output_name=f"{stages[0]}-too-soon", max_train_epochs=100_000, sample_every_n_epochs=0)
    assert school.until(training_id, *stages)["job_status"] in stages
    assert school.api.call("PUT", f"/trainings/{training_id}/stop").status == 200
    assert list(school.events(training_id))[-1]["ended"]["status"] == "Stopped"
    wait_for(lambda: not trainers(stack))
    assert (school.checkpoint(training_id) or {})["status"] == "Disabled", "nothing was saved"


@pytest.mark.slow
def test_a_deadline_ends_a_training_and_says_so(stack: Stack, school: School) -> None:
    answer = school.post(
        deadline_seconds=12,
        output_name="late",
        max_train_epochs=100_000,
        sample_every_n_epochs=0,
    )
    ended = school.until(answer.data["id"])
    assert ended["job_status"] == "Failed"
    assert "longer than its 12 seconds" in ended["params"]["resp"]["error_msg"]
    wait_for(lambda: not trainers(stack))
