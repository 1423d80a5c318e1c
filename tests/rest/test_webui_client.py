"""What the WebUI extension 1.5.0 does with users, models and datasets, call by call (contract 17), on the webui port.

It knows nothing of this service but its URL with a slash at the end, one API key and the name of a user.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import requests

from deploy.local.stack import Stack
from tests.e2e.conftest import wait_for
from tests.rest.tables import fresh
from tests.services.models.files import safetensors, tar

pytestmark = pytest.mark.slow

MIB = 2**20
SLICE_BYTES = 6 * MIB  # it takes 1000 MiB
ORIGIN = {"Origin": "http://webui.example:7860"}


class Extension:
    """Its requests: the URL is put together of texts, the user is named or not."""

    def __init__(self, url: str, key: str, user: str) -> None:
        self.base, self.key, self.user = url, key, user

    def call(self, method: str, path: str, body: Any = None, named: bool = True, **headers: str) -> requests.Response:
        """One request. Whatever is no 204 must be JSON with a message, or the extension breaks."""
        sent = {"x-api-key": self.key, "Content-Type": "application/json"} | ({"username": self.user} if named else {})
        text = None if body is None else json.dumps(body)
        answer = requests.request(method, self.base + path, data=text, headers=sent | headers, timeout=60)
        if answer.status_code != 204:
            assert answer.headers["x-api-version"] == "1.5.0", "else it nags"
            assert answer.json()["statusCode"] == answer.status_code
            assert answer.json()["message"]
        return answer

    def dataset(self, name: str, picture: bytes) -> dict[str, str]:
        """Makes a dataset of one picture; answers the URLs it was told to send to."""
        content = [{"filename": "a.png", "name": "a.png", "type": "image", "params": {}}]
        params = {"description": "cats"}
        body = {"dataset_name": name, "content": content, "prefix": "10_cat", "params": params, "creator": self.user}
        created = self.call("POST", "datasets", body)
        assert created.status_code == 201
        urls: dict[str, str] = created.json()["data"]["s3PresignUrl"]
        for url in urls.values():
            requests.put(url, data=picture, timeout=60).raise_for_status()
        self.call("PUT", f"datasets/{name}", {"status": "Enabled"}).raise_for_status()
        return urls

    def model(self, name: str) -> str:
        """Uploads a small model; answers its id."""
        params = {"message": "", "creator": self.user}
        files = [{"filename": name, "parts_number": 1}]
        body = {"checkpoint_type": "Stable-diffusion", "filenames": files, "params": params}
        data = self.call("POST", "checkpoints", body).json()["data"]
        stored = requests.put(data["s3PresignUrl"][name][0], data=safetensors(), timeout=60)
        tags = {name: [{"ETag": stored.headers["ETag"], "PartNumber": 1}]}
        finish = {"status": "Active", "multi_parts_tags": tags}
        found: str = data["checkpoint"]["id"]
        assert self.call("PUT", f"checkpoints/{found}", finish, named=False).status_code == 200
        return found

    def models(self, query: str) -> list[dict[str, Any]]:
        """The table of models."""
        answer = self.call("GET", f"checkpoints?{query}")
        assert answer.status_code == 200
        data = answer.json()["data"]
        assert all(type(data[name]) is int for name in ("page", "per_page", "pages", "total"))
        for model in data["checkpoints"]:
            assert math.isfinite(float(model["created"]))
            assert model.keys() >= {"id", "name", "s3Location", "type", "status", "allowed_roles_or_users"}
        listed: list[dict[str, Any]] = data["checkpoints"]
        return listed


@pytest.fixture
def extension(stack: Stack) -> Extension:
    """After "Test Connection & Update Setting" with the name of a user that is not there yet."""
    made = Extension(f"{stack.webui_url}/prod/", stack.api_key, fresh("webui-"))
    assert made.call("GET", "ping", named=False).json()["message"] == "pong"
    user = {"initial": True, "username": made.user, "password": "pass wörd", "roles": ["IT Operator"], "creator": "x"}
    for _ in range(2):  # each time the button is pressed
        assert made.call("POST", "users", user).status_code == 201
    return made


def test_it_connects_and_lets_its_users_log_in(extension: Extension) -> None:
    users = extension.call("GET", "users?show_password=True").json()["data"]["users"]
    logins = {user["username"]: user["password"] for user in users}
    assert logins[extension.user] == "pass wörd"
    assert len(logins["api"]) > 40, "nobody logs in as a user without a password"
    (own,) = extension.call("GET", f"users?username={extension.user}&show_password=False").json()["data"]["users"]
    assert own["roles"] == ["IT Operator"]
    assert own["password"] == "********"
    assert {"user:all", "role:all", "checkpoint:all", "inference:all"} <= set(own["permissions"])


def test_it_manages_roles_and_users(extension: Extension) -> None:
    role, name = fresh("role-"), fresh("user-")
    body = {"role_name": role, "permissions": ["checkpoint:all"], "creator": extension.user}
    assert extension.call("POST", "roles", body).status_code in {200, 201}
    roles = extension.call("GET", "roles").json()["data"]["roles"]
    assert {"role_name": role, "creator": extension.user, "permissions": ["checkpoint:all"]} in roles
    user = {"initial": False, "username": name, "password": "p", "roles": [role], "creator": extension.user}
    assert extension.call("POST", "users", user).status_code == 201
    (listed,) = [user for user in extension.call("GET", "users").json()["data"]["users"] if user["username"] == name]
    assert (listed["roles"], listed["creator"]) == ([role], extension.user)
    assert extension.call("DELETE", "users", {"user_name_list": [name]}).status_code == 204
    assert extension.call("GET", f"users?username={name}").json()["data"]["users"] == []
    unknown = extension.call("POST", "users", user | {"roles": ["no such role"]})
    assert (unknown.status_code, unknown.json()["message"]) == (400, 'user roles "no such role" not exist')


def test_it_uploads_a_model_as_a_tar_in_slices_renames_and_deletes_it(extension: Extension) -> None:
    name, model = f"{fresh()}.safetensors", safetensors(SLICE_BYTES + MIB)
    packed = tar(f"models/Stable-diffusion/{name}", model)
    num_parts = math.ceil(len(model) / SLICE_BYTES)
    body = {
        "checkpoint_type": "Stable-diffusion",
        "filenames": [{"filename": name, "parts_number": num_parts}],
        "params": {"message": "hello", "creator": extension.user},
    }
    opened = extension.call("POST", "checkpoints", body)
    assert opened.status_code in {201, 202}
    checkpoint, urls = opened.json()["data"]["checkpoint"], opened.json()["data"]["s3PresignUrl"][name]
    assert checkpoint["s3_location"].endswith(f"/Stable-diffusion/checkpoint/custom/{checkpoint['id']}")
    tags = []
    for number, url in enumerate(urls, 1):
        answer = requests.put(url, data=packed[(number - 1) * SLICE_BYTES : number * SLICE_BYTES], timeout=60)
        answer.raise_for_status()
        tags.append({"ETag": answer.headers["ETag"], "PartNumber": number})
    finish = {"status": "Active", "multi_parts_tags": {name: tags}}
    assert extension.call("PUT", f"checkpoints/{checkpoint['id']}", finish, named=False).status_code == 200
    query = "types=Stable-diffusion&status=Active&per_page=100"
    (shown,) = [model for model in extension.models(query) if model["id"] == checkpoint["id"]]
    assert (shown["name"], shown["allowed_roles_or_users"]) == ([name], ["IT Operator"])
    assert shown["params"]["creator"] == extension.user
    assert extension.call("PUT", f"checkpoints/{checkpoint['id']}", {"name": fresh("n")}).json()["statusCode"] == 202
    assert extension.call("DELETE", "checkpoints", {"checkpoint_id_list": [checkpoint["id"]]}).status_code == 204
    assert not [model for model in extension.models("per_page=100") if model["id"] == checkpoint["id"]]


def test_its_browser_uploads_several_files_and_names_nobody(extension: Extension) -> None:
    names = [f"{fresh()}.safetensors", f"{fresh()}.yaml"]
    contents = dict(zip(names, (safetensors(), b"model: {}"), strict=True))
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
    assert requests.options(f"{extension.base}checkpoints", headers=ORIGIN | asked, timeout=60).status_code == 204
    plain = {"Content-Type": "text/plain;charset=UTF-8"}
    body = {
        "checkpoint_type": "Stable-diffusion",
        "filenames": [{"filename": name, "parts_number": 1} for name in names],
        "params": {"message": "", "creator": ""},
    }
    opened = extension.call("POST", "checkpoints", body, named=False, **plain, **ORIGIN)
    assert (opened.status_code, opened.headers["access-control-allow-origin"]) == (201, "*")
    data = opened.json()["data"]
    assert data["checkpoint"]["params"]["creator"] == "api", "the key's owner"
    for name in names:
        (url,) = data["s3PresignUrl"][name]
        stored = requests.put(url, data=contents[name], headers=ORIGIN, timeout=60)
        assert stored.status_code == 200
        assert "etag" in stored.headers["access-control-expose-headers"].lower(), "else the browser hides it"
        tags = {name: [{"ETag": stored.headers["ETag"], "PartNumber": 1}]}
        finish = {"status": "Active", "multi_parts_tags": tags}
        path = f"checkpoints/{data['checkpoint']['id']}"
        assert extension.call("PUT", path, finish, named=False, **plain, **ORIGIN).status_code == 200
        (shown,) = [model for model in extension.models("per_page=100") if model["id"] == data["checkpoint"]["id"]]
        assert shown["status"] == ("Active" if name == names[-1] else "Initial")


def test_it_imports_models_by_url(extension: Extension) -> None:
    name = f"{fresh()}.safetensors"
    body = {
        "checkpoint_type": "Lora",
        "urls": [f"http://10.0.0.1/{name}"],
        "params": {"message": "m", "creator": extension.user},
    }
    answer = extension.call("POST", "checkpoints", body)
    assert answer.json()["message"] == "Checkpoint creation in progress, please check later"

    def ended() -> dict[str, Any] | None:
        found = [model for model in extension.models("types=Lora&per_page=100") if model["name"] == [name]]
        return found[0] if found[0]["status"] == "Disabled" else None

    shown = wait_for(ended)
    assert shown["params"]["creator"] == extension.user
    assert shown["params"]["error"] == "10.0.0.1 is not a public address"


def test_it_makes_shows_and_deletes_a_dataset(extension: Extension) -> None:
    name, picture = fresh("d"), b"\x89PNG\r\n\x1a\n"
    extension.dataset(name, picture)
    enabled = extension.call("GET", "datasets?dataset_status=Enabled").json()["data"]["datasets"]
    (listed,) = [dataset for dataset in enabled if dataset["datasetName"] == name]
    assert math.isfinite(float(listed["timestamp"]))
    shown = extension.call("GET", f"datasets/{name}").json()["data"]
    assert (shown["description"], shown["s3"][-len(f"/dataset/{name}/10_cat") :]) == ("cats", f"/dataset/{name}/10_cat")
    (file,) = shown["data"]
    assert file["key"].endswith("_a.png")
    assert requests.get(file["preview_url"], timeout=60).content == picture
    assert extension.call("DELETE", "datasets", {"dataset_name_list": [name]}, named=False).status_code == 204
    gone = extension.call("GET", f"datasets/{name}")
    assert (gone.status_code, gone.json()["message"]) == (404, f"dataset {name} is not found")


def test_it_trains_a_lora_of_its_model_and_its_dataset_and_shows_and_deletes_it(extension: Extension) -> None:
    name, model = fresh("d"), f"{fresh()}.safetensors"
    extension.dataset(name, b"no picture at all")
    extension.model(model)
    settings = {
        "saving_arguments": {"output_name": "lora", "save_every_n_epochs": 1000},
        "training_arguments": {"max_train_epochs": 100},
    }
    wanted = {"training_instance_type": "ml.g4dn.2xlarge", "model": model, "dataset": name, "fm_type": "sd_1_5"}
    body = {"lora_train_type": "kohya", "params": {"training_params": wanted, "config_params": settings}}
    begun = extension.call("POST", "trainings", body)
    assert (begun.status_code, begun.json()["statusCode"], begun.json()["message"]) == (201, 201, "Created")
    training_id = begun.json()["data"]["id"]

    listed = extension.call("GET", f"trainings?username={extension.user}").json()
    assert listed["statusCode"] == 200
    for training in listed["data"]["trainings"]:
        assert training.keys() >= {"id", "sagemakerTrainName", "modelName", "status", "trainType"}
        assert training["params"]["config_params"]["saving_arguments"]["output_name"], "else its page breaks"
    (shown,) = [training for training in listed["data"]["trainings"] if training["id"] == training_id]
    arguments = shown["params"]["config_params"]
    assert arguments["saving_arguments"] == {"output_name": "lora", "save_every_n_epochs": 1000}
    assert arguments["training_arguments"] == {"max_train_epochs": 100}
    told = shown["params"]["training_params"]
    assert (told["fm_type"], told["s3_data_path"][-len(f"/dataset/{name}") :]) == ("sd_1_5", f"/dataset/{name}")
    assert told["s3_model_path"].endswith(f"/{model}")

    for changed, sentence in (
        ({"model": "no such model"}, "Model not found"),
        ({"dataset": "no such dataset"}, "Dataset not found"),
        ({"fm_type": "sd_3"}, "Invalid fm_type sd_3, the valid values are sd_1_5 and sd_xl"),
    ):
        params = {"training_params": wanted | changed, "config_params": settings}
        refused = extension.call("POST", "trainings", {"lora_train_type": "kohya", "params": params})
        assert (refused.status_code, refused.json()["message"][: len(sentence)]) == (400, sentence)

    assert extension.call("DELETE", "trainings", {"training_id_list": [training_id]}).status_code == 204
    left = extension.call("GET", f"trainings?username={extension.user}").json()["data"]["trainings"]
    assert not [training for training in left if training["id"] == training_id]
    assert extension.models(f"types=Stable-diffusion&per_page=100&username={extension.user}"), "its model stays"


def test_it_deploys_shows_and_deletes_an_endpoint(extension: Extension) -> None:
    name = fresh("e")
    body = {
        "endpoint_name": name,
        "endpoint_type": "Async",
        "instance_type": "ml.g5.2xlarge",
        "initial_instance_count": "1",
        "min_instance_number": "0",
        "max_instance_number": "1",
        "autoscaling_enabled": True,
        "custom_docker_image_uri": "",
        "custom_extensions": "",
        "assign_to_roles": ["IT Operator"],
        "creator": extension.user,
    }
    answer = extension.call("POST", "endpoints", body)
    assert answer.status_code in {200, 201, 202}, answer.json()
    listed = extension.call("GET", f"endpoints?username={extension.user}").json()["data"]["endpoints"]
    (shown,) = [endpoint for endpoint in listed if endpoint["endpoint_name"] == f"esd-async-{name}"]
    assert (shown["endpoint_type"], shown["instance_type"]) == ("Async", "ml.g5.2xlarge")
    assert (shown["owner_group_or_role"], shown["autoscaling"]) == (["IT Operator"], True)
    assert shown["endpoint_status"] in {"Creating", "InService"}
    assert {str(shown["min_instance_number"]), str(shown["max_instance_number"])} == {"0", "1"}
    assert len(shown["startTime"].split(" ")) == 2
    deleted = extension.call("DELETE", "endpoints", {"endpoint_name_list": [shown["endpoint_name"]]})
    assert deleted.status_code == 204
