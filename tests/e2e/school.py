"""Trainings over REST: a user with a dataset of four pictures, who begins and watches them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from tests.e2e.conftest import Answer, Api, wait_for
from tests.pictures import circle

# A training of seconds on one thread: 64 pixels, two steps for each of four pictures.
KEYS: dict[str, Any] = {
    "resolution": "64,64", "max_train_epochs": 2, "save_every_n_epochs": 1, "network_dim": 4, "network_alpha": 4,
    "unet_lr": 0.01, "text_encoder_lr": 0.001, "optimizer_type": "AdamW", "mixed_precision": "no",
    "sample_prompts": "a zog --s 2",
}  # fmt: skip
ENDS = {"Completed", "Failed", "Stopped"}


@dataclass(frozen=True)
class School:
    """A user who can train and draw, the name and the S3 path of a base model, and the S3 path of a dataset."""

    api: Api
    model: str
    model_path: str
    data_path: str

    def post(
        self, training_params: dict[str, Any] | None = None, deadline_seconds: int | None = None, **keys: Any
    ) -> Answer:
        """Asks for a training in the document's shape."""
        given = {
            "training_instance_type": "cpu",
            "s3_model_path": self.model_path,
            "s3_data_path": self.data_path,
            "fm_type": "sd_1_5",
        }
        params = {"training_params": given | (training_params or {}), "config_params": {"training": KEYS | keys}}
        deadline = {} if deadline_seconds is None else {"deadline_seconds": deadline_seconds}
        return self.api.call("POST", "/trainings", {"lora_train_type": "kohya", "params": params} | deadline)

    def begin(self, **keys: Any) -> str:
        """Begins a training; answers its id."""
        answer = self.post(**keys)
        assert answer.status == 200, answer.body
        training_id: str = answer.data["id"]
        return training_id

    def get(self, training_id: str) -> dict[str, Any]:
        """The training."""
        found: dict[str, Any] = self.api.ok("GET", f"/trainings/{training_id}")
        return found

    def until(self, training_id: str, *statuses: str) -> dict[str, Any]:
        """Waits until the training has one of the statuses, or has ended."""

        def reached() -> dict[str, Any] | None:
            found = self.get(training_id)
            return found if found["job_status"] in {*statuses, *ENDS} else None

        found: dict[str, Any] = wait_for(reached, 300)
        return found

    def events(self, training_id: str) -> Iterator[dict[str, Any]]:
        """What a watcher of the training is told, to its end."""
        url, headers = f"{self.api.url}/trainings/{training_id}/events", {"x-api-key": self.api.key}
        with httpx.stream("GET", url, headers=headers, timeout=300) as answer:
            assert answer.headers["content-type"] == "text/event-stream"
            for line in answer.iter_lines():
                if line:
                    yield json.loads(line.removeprefix("data: "))

    def steps(self, training_id: str) -> list[int]:
        """The steps of the training's loss curve."""
        points = self.api.ok("GET", f"/trainings/{training_id}/metrics")["points"]
        return [point["step"] for point in points]

    def checkpoint(self, training_id: str) -> dict[str, Any] | None:
        """The training's row in the list of checkpoints."""
        listed = self.api.ok("GET", "/checkpoints?types=Lora&per_page=100")["checkpoints"]
        return next((row for row in listed if row["id"] == training_id), None)


def add_dataset(api: Api, name: str, files: dict[str, bytes]) -> str:
    """Uploads a dataset of the concept `2_zog`; answers its S3 path."""
    content = [{"filename": file, "name": file, "type": "image", "params": {}} for file in files]
    body = {"dataset_name": name, "content": content, "prefix": "2_zog", "params": {"description": "zogs"}}
    urls = api.ok("POST", "/datasets", body, 201)["s3PresignUrl"]
    for file, url in urls.items():
        assert api.put(url, files[file]).status_code == 200
    api.ok("PUT", f"/datasets/{name}", {"status": "Enabled"})
    path: str = api.ok("GET", f"/datasets/{name}")["s3"]
    return path.removesuffix("/2_zog")


def open_school(api: Api, model: str) -> School:
    """Uploads four pictures with captions for a user who may train on the model."""
    files = {f"{number}.png": circle(60 * number) for number in range(4)}
    data_path = add_dataset(api, "zogs", files | {f"{number}.txt": b"a zog, green" for number in range(4)})
    return School(api, model, path_of(api, model), data_path)


def path_of(api: Api, model: str) -> str:
    """The S3 path of a base model's only file."""
    models = api.ok("GET", "/checkpoints?types=Stable-diffusion&per_page=100")["checkpoints"]
    (found,) = [row for row in models if row["name"] == [model]]
    return f"{found['s3Location']}/{model}"
