"""The whole stack, started once, and clients that speak REST to it as users do."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.local.stack import Stack
from gpu_worker.models import tiny

PART_BYTES = 5 * 2**20  # the smallest that S3 takes for any part but the last
# One thread, because torch's threads spin while they wait for a core that another test has.
SETTINGS = {"ESD_BASE_PATH": "/prod", "ESD_NUM_THREADS": "1"}
PICTURE = {"prompt": "a red circle", "steps": 3, "width": 64, "height": 64, "seed": 7, "sampler_name": "Euler a"}


@dataclass(frozen=True)
class Answer:
    """What came back: the HTTP status, the decoded body (None when empty) and the headers."""

    status: int
    body: Any
    headers: httpx.Headers

    @property
    def data(self) -> Any:
        """The envelope's data."""
        assert self.body is not None, self
        return self.body["data"]

    @property
    def message(self) -> str:
        """The envelope's message."""
        message: str = self.body["message"]
        return message


class Api:
    """REST with one key, and maybe a `username`."""

    def __init__(self, url: str, key: str, username: str | None = None) -> None:
        self.url = url
        self.key = key
        self.username = username
        self._http = httpx.Client(base_url=url, timeout=httpx.Timeout(120))

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        content: str | None = None,
    ) -> Answer:
        """One request with the key, and the body as JSON unless raw `content` is given."""
        sent = {"x-api-key": self.key} | ({"username": self.username} if self.username else {}) | (headers or {})
        text = content if content is not None else (None if body is None else json.dumps(body))
        answer = self._http.request(method, path, content=text, headers=sent)
        decoded = json.loads(answer.content) if answer.content else None
        return Answer(answer.status_code, decoded, answer.headers)

    def ok(self, method: str, path: str, body: Any = None, status: int = 200) -> Any:
        """One request that must have this status; answers the data, or None."""
        answer = self.call(method, path, body)
        assert answer.status == status, (method, path, answer.status, answer.body)
        return (answer.body or {}).get("data")

    def put(self, url: str, content: bytes) -> httpx.Response:
        """Writes to a presigned URL."""
        return httpx.put(url, content=content, timeout=60)

    def get(self, url: str) -> bytes:
        """Reads a presigned URL."""
        answer = httpx.get(url, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.content

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()


def wait_for(condition: Callable[[], Any], seconds: float = 180) -> Any:
    """Asks again until the answer is true, as a REST client has to, less and less often, since every question is work
    for the stack; fails after so many seconds."""
    deadline, pause = time.monotonic() + seconds, 0.05
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not true after {seconds} s: {condition}"
        time.sleep(pause)
        pause = min(1.2 * pause, 0.5)
    return result


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """The one-machine stack with both listeners and a base path, in a home of its own."""
    with tempfile.TemporaryDirectory(prefix="esd-e2e-") as folder:
        Path(folder).chmod(0o711)  # PostgreSQL's user must get through, when root runs this
        stack = Stack(Path(folder) / "home", webui=True, env_overrides=SETTINGS)
        stack.start(timeout_seconds=400)  # services import much, and the machine may be busy
        try:
            yield stack
        finally:
            stack.stop()


@pytest.fixture(scope="session")
def admin(stack: Stack) -> Iterator[Api]:
    """The first key on the document port; it may act for anybody."""
    api = Api(stack.url, stack.api_key)
    yield api
    api.close()


@pytest.fixture(scope="session")
def webui(stack: Stack) -> Iterator[Api]:
    """The first key on the webui port, acting as `api`."""
    api = Api(stack.webui_url, stack.api_key, "api")
    yield api
    api.close()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD1.5 checkpoint that takes two parts."""
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    tiny.write(path)
    return path


def new_user(admin: Api, name: str, permissions: list[str]) -> Api:
    """A role, a user and a key of the same name; answers the user's client."""
    admin.ok("POST", "/roles", {"role_name": name, "permissions": permissions}, 201)
    admin.ok("POST", "/users", {"username": name, "password": "secret", "roles": [name]}, 201)
    key = admin.ok("POST", "/keys", {"username": name}, 201)["key"]
    return Api(admin.url, key)


def upload(api: Api, path: Path, name: str | None = None, checkpoint_type: str = "Stable-diffusion") -> Answer:
    """Uploads a file in parts and asks for its activation; answers that."""
    content = path.read_bytes()
    name = name or path.name
    parts = [content[at : at + PART_BYTES] for at in range(0, len(content), PART_BYTES)] or [b""]
    opened = api.ok(
        "POST",
        "/checkpoints",
        {
            "checkpoint_type": checkpoint_type,
            "filenames": [{"filename": name, "parts_number": len(parts)}],
            "params": {"message": "test"},
        },
        201,
    )
    tags = []
    for number, (url, part) in enumerate(zip(opened["s3PresignUrl"][name], parts, strict=True), 1):
        answer = api.put(url, part)
        assert answer.status_code == 200, answer.text
        tags.append({"ETag": answer.headers["etag"], "PartNumber": number})
    return api.call(
        "PUT", f"/checkpoints/{opened['checkpoint']['id']}", {"status": "Active", "multi_parts_tags": {name: tags}}
    )


def deploy(api: Api, name: str, kind: str, role: str) -> str:
    """Creates an endpoint with one worker and waits until it is in service; answers its full name."""
    body = {
        "endpoint_name": name,
        "endpoint_type": kind,
        "instance_type": "local",
        "initial_instance_count": 1,
        "autoscaling_enabled": False,
        "assign_to_roles": [role],
    }
    created = api.ok("POST", "/endpoints", body)
    path = f"/endpoints?endpointDeploymentJobId={created['EndpointDeploymentJobId']}"

    def in_service() -> bool:
        (endpoint,) = api.ok("GET", path)["endpoints"]
        assert endpoint["endpoint_status"] != "Failed", endpoint["error"]
        return bool(endpoint["endpoint_status"] == "InService")

    wait_for(in_service)
    endpoint_name: str = created["endpoint_name"]
    return endpoint_name


def create_job(api: Api, model: str, kind: str = "Async", payload: Any = PICTURE) -> str:
    """Creates a txt2img job and uploads its payload; answers its id."""
    body = {"task_type": "txt2img", "inference_type": kind, "models": {"Stable-diffusion": [model]}}
    created = api.ok("POST", "/inferences", body, 201)["inference"]
    content = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    assert api.put(created["api_params_s3_upload_url"], content).status_code == 200
    job_id: str = created["id"]
    return job_id


def finished(api: Api, job_id: str, seconds: float = 300) -> Any:
    """Waits for the end of a job and answers it."""

    def ended() -> Any:
        job = api.ok("GET", f"/inferences/{job_id}")
        return job if job["status"] in {"succeed", "failed"} else None

    return wait_for(ended, seconds)


@dataclass(frozen=True)
class Studio:
    """A user who can draw: an Async endpoint with one worker, and a model."""

    api: Api
    model: str
    endpoint: str


@pytest.fixture(scope="session")
def studio(admin: Api, checkpoint: Path) -> Iterator[Studio]:
    """The role, user, key, model and Async endpoint that most tests share."""
    api = new_user(admin, "painter", ["checkpoint:all", "sagemaker_endpoint:all", "inference:all"])
    answer = upload(api, checkpoint)
    assert answer.status == 200, answer.body
    yield Studio(api, checkpoint.name, deploy(api, "studio", "Async", "painter"))
    api.close()
