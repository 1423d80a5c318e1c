"""How soon a training takes its first step: from the request to the event of that step.

python -m tests.bench trainings
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx

from deploy.local.demo import Client
from deploy.local.stack import Stack
from tests.pictures import circle

_NUM_TRAININGS = 3
_NUM_PICTURES = 4
# 64 pixels, and more steps than anybody waits for.
_KEYS: dict[str, Any] = {
    "resolution": "64,64", "max_train_epochs": 100_000, "network_dim": 4, "network_alpha": 4, "optimizer_type": "AdamW",
    "mixed_precision": "no", "sample_every_n_epochs": 0,
}  # fmt: skip
_PHASES = ("Downloading", "Training")


def first_steps(stack: Stack, client: Client, model: str) -> dict[str, list[float]]:
    """Seconds from the request of a training until a watcher hears of its phases and of its first step, by name. One
    training before them warms up what a machine keeps: files that were read, and the base model's copy on disk."""
    body = _request(client, model)
    found: dict[str, list[float]] = {}
    for number in range(1 + _NUM_TRAININGS):
        body["params"]["config_params"]["training"]["output_name"] = f"bench-{number}"
        began = time.monotonic()
        training_id = client.call("POST", "/trainings", body)["id"]
        for name in _heard(stack, training_id):
            if number:
                found.setdefault(name, []).append(time.monotonic() - began)
        client.call("PUT", f"/trainings/{training_id}/stop")
        while client.call("GET", f"/trainings/{training_id}")["job_status"] != "Stopped":
            time.sleep(0.05)
    return found


def _request(client: Client, model: str) -> dict[str, Any]:
    """A training of the model on pictures that it uploads."""
    names = [f"{number}.png" for number in range(_NUM_PICTURES)]
    content = [{"filename": name, "name": name, "type": "image", "params": {}} for name in names]
    dataset = {"dataset_name": "bench", "content": content, "prefix": "1_zog", "params": {"description": "circles"}}
    urls = client.call("POST", "/datasets", dataset)["s3PresignUrl"]
    for number, name in enumerate(names):
        picture = circle(60 * number)
        client.put(urls[name], picture, len(picture))
    client.call("PUT", "/datasets/bench", {"status": "Enabled"})
    rows = client.call("GET", "/checkpoints", types="Stable-diffusion", per_page="100")["checkpoints"]
    (base,) = [row for row in rows if row["name"] == [model]]
    given = {
        "training_instance_type": "cpu",
        "s3_model_path": f"{base['s3Location']}/{model}",
        "s3_data_path": client.call("GET", "/datasets/bench")["s3"].removesuffix("/1_zog"),
        "fm_type": "sd_1_5",
    }
    return {
        "lora_train_type": "kohya",
        "params": {"training_params": given, "config_params": {"training": dict(_KEYS)}},
    }


def _heard(stack: Stack, training_id: str) -> Iterator[str]:
    """The names of phases as a watcher hears of them, and at last `step`."""
    url, headers = f"{stack.url}/trainings/{training_id}/events", {"x-api-key": stack.api_key}
    with httpx.stream("GET", url, headers=headers, timeout=300) as answer:
        for line in answer.iter_lines():
            event = json.loads(line.removeprefix("data: ")) if line else {}
            if (status := event.get("status", {}).get("status")) in _PHASES:
                yield status
            if "step" in event:
                yield "step"
                return
            if "ended" in event:
                break
    raise SystemExit("the training ended before its first step")
