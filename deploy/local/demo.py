"""The whole way of a picture through the REST API, as a new user would go it: `make demo`.

Everything after the start of the stack is plain HTTP against the gateway, so this file is also the shortest example of
a client.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

ROLE = USER = "demo"
PERMISSIONS = ["checkpoint:all", "sagemaker_endpoint:all", "inference:all"]
PART_BYTES = 64 * 1024 * 1024
MAX_PARTS = 100
POLL_SECONDS = 0.2


class DemoFailed(Exception):
    """A request was refused or a job failed; the message is the service's own."""


@dataclass(frozen=True)
class Picture:
    """What to draw."""

    prompt: str
    width: int
    height: int
    steps: int = 20
    seed: int = 42

    def payload(self) -> dict[str, Any]:
        """The A1111-style payload."""
        return {
            "prompt": self.prompt,
            "negative_prompt": "",
            "steps": self.steps,
            "cfg_scale": 7,
            "width": self.width,
            "height": self.height,
            "seed": self.seed,
            "sampler_name": "Euler a",
        }


class Client:
    """The REST API with one key."""

    def __init__(self, url: str, key: str) -> None:
        # The demo speaks to its own machine: past proxies, and its certificate may be one that nobody else trusts.
        way: dict[str, Any] = {"verify": False, "trust_env": False}
        self._http = httpx.Client(base_url=url, headers={"x-api-key": key}, timeout=60, **way)
        self._store = httpx.Client(timeout=None, **way)  # noqa: S113 - a part may take minutes on a slow line

    def call(
        self, method: str, path: str, body: Any = None, timeout: float | None = 60, **query: str
    ) -> dict[str, Any]:
        """One request; answers the envelope's data.

        Raises:
            DemoFailed: the service refused it, in its words.
        """
        answer = self._http.request(method, path, json=body, params=query or None, timeout=timeout)
        envelope: dict[str, Any] = answer.json() if answer.content else {}
        if answer.is_error:
            raise DemoFailed(f"{method} {path}: {answer.status_code} {envelope.get('message', answer.text)}")
        data: dict[str, Any] = envelope.get("data", {})
        return data

    def put(self, url: str, content: bytes | Iterator[bytes], size_bytes: int) -> str:
        """Writes to a presigned URL and answers the ETag."""
        answer = self._store.put(url, content=content, headers={"content-length": str(size_bytes)})
        if answer.is_error:
            raise DemoFailed(f"upload: {answer.status_code} {answer.text}")
        return str(answer.headers.get("etag", ""))

    def put_json(self, url: str, content: dict[str, Any]) -> None:
        """Writes JSON to a presigned URL."""
        encoded = json.dumps(content).encode()
        self.put(url, encoded, len(encoded))

    def download(self, url: str, folder: Path) -> Path:
        """Reads a presigned URL into a file named by the URL's last segment."""
        answer = self._store.get(url)
        if answer.is_error:
            raise DemoFailed(f"download: {answer.status_code} {answer.text}")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / urlsplit(url).path.rsplit("/", 1)[-1]
        path.write_bytes(answer.content)
        return path

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()
        self._store.close()


def run(
    url: str, api_key: str, checkpoint: Path, picture: Picture, output: Path, console: Console, part_bytes: int
) -> list[Path]:
    """Goes the whole way once for an Async and once for a Real-time endpoint; answers the files that were downloaded.

    Raises:
        DemoFailed: a step was refused or a job failed.
    """
    admin = Client(url, api_key)
    admin.call("POST", "/roles", {"role_name": ROLE, "permissions": PERMISSIONS})
    admin.call("POST", "/users", {"username": USER, "password": os.urandom(16).hex(), "roles": [ROLE]})
    key = admin.call("POST", "/keys", {"username": USER})["key"]
    admin.close()
    console.print(f"role, user and key [bold]{USER}[/] created")

    client = Client(url, key)
    upload(client, checkpoint, console, part_bytes)
    for endpoint in client.call("GET", "/endpoints", limit="-1")["endpoints"]:
        if endpoint["owner_group_or_role"] == [ROLE]:  # left by a demo that was interrupted
            client.call("DELETE", "/endpoints", {"endpoint_name_list": [endpoint["endpoint_name"]]})
    files: list[Path] = []
    for kind in ("Async", "Real-time"):
        name = deploy(client, kind, console)
        files += draw(client, kind, checkpoint.name, picture, output / kind.lower(), console)
        client.call("DELETE", "/endpoints", {"endpoint_name_list": [name]})
    client.close()
    return files


def upload(client: Client, checkpoint: Path, console: Console, part_bytes: int) -> None:
    """Uploads the checkpoint in presigned parts and activates it, unless one of that name is active already."""
    size = checkpoint.stat().st_size
    for item in client.call("GET", "/checkpoints", per_page="1000", status="Active")["checkpoints"]:
        if checkpoint.name in (item["name"] or []):
            if int(item["params"]["size"][checkpoint.name]) != size:
                raise DemoFailed(f"another file named {checkpoint.name} is there already: rename yours")
            console.print(f"checkpoint [bold]{checkpoint.name}[/] is there already")
            return
    part_bytes = max(part_bytes, math.ceil(size / MAX_PARTS))
    opened = client.call(
        "POST",
        "/checkpoints",
        {
            "checkpoint_type": "Stable-diffusion",
            "filenames": [{"filename": checkpoint.name, "parts_number": max(1, math.ceil(size / part_bytes))}],
            "params": {"message": "uploaded by the demo"},
        },
    )
    tags = []
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with checkpoint.open("rb") as file, Progress(*columns, console=console) as progress:
        task = progress.add_task(f"uploading {checkpoint.name}", total=size)

        def chunks(length: int) -> Iterator[bytes]:
            while length and (chunk := file.read(min(length, 1024 * 1024))):
                length -= len(chunk)
                progress.advance(task, len(chunk))
                yield chunk

        for index, url in enumerate(opened["s3PresignUrl"][checkpoint.name]):
            length = min(part_bytes, size - index * part_bytes)
            tags.append({"ETag": client.put(url, chunks(length), length), "PartNumber": index + 1})
    body = {"status": "Active", "multi_parts_tags": {checkpoint.name: tags}}
    client.call("PUT", f"/checkpoints/{opened['checkpoint']['id']}", body, timeout=None)
    console.print(f"checkpoint [bold]{checkpoint.name}[/] is active ({len(tags)} part{'s' * (len(tags) > 1)})")


def deploy(client: Client, kind: str, console: Console) -> str:
    """Creates an endpoint with one worker, waits until it is in service and answers its name."""
    body = {
        "endpoint_name": "demo",
        "endpoint_type": kind,
        "instance_type": "local",
        "initial_instance_count": 1,
        "autoscaling_enabled": False,
        "assign_to_roles": [ROLE],
    }
    endpoint = client.call("POST", "/endpoints", body)
    name: str = endpoint["endpoint_name"]
    with console.status(f"endpoint {name} is starting its worker"):
        while endpoint["endpoint_status"] != "InService":
            if endpoint["endpoint_status"] == "Failed":
                raise DemoFailed(f"endpoint {name} failed: {endpoint['error']}")
            time.sleep(POLL_SECONDS)
            query = {"endpointDeploymentJobId": endpoint["EndpointDeploymentJobId"]}
            (endpoint,) = client.call("GET", "/endpoints", **query)["endpoints"]
    console.print(f"endpoint [bold]{name}[/] is in service")
    return name


def draw(client: Client, kind: str, checkpoint: str, picture: Picture, folder: Path, console: Console) -> list[Path]:
    """Creates a txt2img job, uploads its payload, starts it, waits, and downloads what it made."""
    body = {
        "task_type": "txt2img",
        "inference_type": kind,
        "models": {"Stable-diffusion": [checkpoint], "VAE": ["Automatic"], "embeddings": []},
    }
    created = client.call("POST", "/inferences", body)["inference"]
    client.put_json(created["api_params_s3_upload_url"], picture.payload())
    with console.status(f"{kind} job {created['id']} is running"):
        # The answer to a Real-time start is the finished job itself.
        client.call("PUT", f"/inferences/{created['id']}/start", timeout=None)
        while (job := client.call("GET", f"/inferences/{created['id']}"))["status"] == "inprogress":
            time.sleep(POLL_SECONDS)
    if job["status"] != "succeed":
        raise DemoFailed(f"job {created['id']} failed: {job['sagemakerRaw']}")
    urls = [*job["img_presigned_urls"], *job["output_presigned_urls"]]
    files = [client.download(url, folder) for url in urls]
    console.print(f"{kind} job done: " + ", ".join(str(file) for file in files), soft_wrap=True)
    return files
