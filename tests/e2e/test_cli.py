"""`esd keys`, `esd audit verify` and `esd verify` on the running stack, as its owner types them."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from deploy.local.home import Home
from deploy.local.stack import Stack, read_state
from gpu_worker.models import tiny
from tests.e2e.conftest import PICTURE, Api, Studio, finished, new_user, upload
from tests.gpu_worker import tiny_lora
from tests.pictures import encoded, noise
from tests.processes import ROOT

Esd = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def esd(stack: Stack) -> Esd:
    """Runs a command on the stack's home."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "deploy.local.cli", *map(str, arguments)]
        variables = {**os.environ, "COLUMNS": "80", "ESD_HOME": str(stack.home)}
        return subprocess.run(
            command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120, check=False
        )

    return run


def opens(stack: Stack, key: str) -> bool:
    return httpx.get(f"{stack.url}/ping", headers={"x-api-key": key}).status_code == 200


@pytest.mark.slow
def test_a_key_is_made_shown_listed_and_revoked(esd: Esd, stack: Stack, admin: Api) -> None:
    new_user(admin, "cli-ann", ["train:all"])
    made = esd("keys", "create", "cli-ann", "--days", "3")
    assert made.returncode == 0, made.stderr
    key = made.stdout.strip()
    assert opens(stack, key)
    assert key not in made.stderr

    first, second = json.loads(esd("keys", "list", "--user", "cli-ann", "--json").stdout)
    assert (first["prefix"], first["impersonate"], "expires" in first, "expires" in second) == (
        key[:12],
        False,
        True,
        False,
    )
    table = esd("keys", "list").stdout
    (row,) = [line for line in table.splitlines() if first["id"] in line]
    assert row.rstrip().endswith(first["expires"][:16])  # whole, however narrow the terminal is
    assert key not in table

    unknown = esd("keys", "revoke", first["id"], "nonsense")
    assert (unknown.returncode, unknown.stderr) == (
        1,
        "there is no key with the id nonsense; `esd keys list` shows those that are\n",
    )
    assert opens(stack, key)
    assert esd("keys", "revoke", first["id"]).stdout == f"revoked: {first['id']}\n"
    assert not opens(stack, key)


@pytest.mark.slow
def test_what_goes_wrong_with_keys_is_said_in_one_sentence(esd: Esd, stack: Stack, tmp_path: Path) -> None:
    wrong, binary = tmp_path / "wrong", tmp_path / "binary"
    wrong.write_text("esd_wrong")
    binary.write_bytes(b"\xff")
    door = ("--url", stack.url)
    for arguments, words in [
        (("create", "cli-nobody"), 'username: user "cli-nobody" not exist (400)'),
        (("list", *door), "--url needs --key-file: a file with an API key of that gateway"),
        (("list", *door, "--key-file", wrong), f"the key in {wrong} does not open {stack.url}: it is wrong, revoked"),
        (("list", *door, "--key-file", tmp_path / "none"), f"--key-file {tmp_path}/none: No such file or directory"),
        (("list", *door, "--key-file", binary), f"--key-file {binary}: this is no text"),
        (("list", "--url", "http://127.0.0.1:1", "--key-file", wrong), "the gateway at http://127.0.0.1:1 does not"),
        (("list", "--home", tmp_path), f"no stack runs in {tmp_path}: start one with `esd up`, or name a gateway"),
    ]:
        refused = esd("keys", *arguments)
        assert refused.returncode == 1, arguments
        assert refused.stdout == ""
        assert refused.stderr.startswith(words), refused.stderr
        assert refused.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_audit_of_the_stack_is_whole_and_an_altered_row_is_named(esd: Esd, stack: Stack, admin: Api) -> None:
    lies = {"x-forwarded-for": "10.9.9.9", "x-request-id": "mine"}
    body = {"role_name": "cli-bob", "permissions": ["train:all"]}
    request_id = admin.call("POST", "/roles", body, headers=lies).headers["x-request-id"]
    assert request_id != "mine"
    whole = esd("audit", "verify", "--log", stack.log_file)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert whole.stdout.count("whole") == 3
    assert whole.stdout.count("the log's last head is row") == 3
    assert "no head of it was given" in esd("audit", "verify", "--service", "models").stdout

    state = read_state(stack.home)
    assert state is not None
    password = Home(stack.home).database_password("identity")
    port = state.processes["postgres"].port
    forge = "UPDATE audit SET actor = CASE actor WHEN 'api' THEN 'eve' ELSE 'api' END WHERE sequence = {}"
    with psycopg.connect(f"postgresql://identity:{password}@127.0.0.1:{port}/identity") as connection:
        row = connection.execute(
            "SELECT sequence, key_owner, request_id, address FROM audit"
            " WHERE action = 'role.create' AND target = 'cli-bob'"
        ).fetchone()
        assert row is not None
        number, owner, audited_id, address = row
        assert (owner, audited_id) == ("api", request_id)
        assert ipaddress.ip_address(address) != ipaddress.ip_address("10.9.9.9"), "the gateway's word counts"
        connection.execute("ALTER TABLE audit DISABLE TRIGGER USER")
        connection.execute(forge.format(number))
    broken = esd("audit", "verify", "--service", "identity")
    with psycopg.connect(f"postgresql://identity:{password}@127.0.0.1:{port}/identity") as connection:
        connection.execute(forge.format(number))
        connection.execute("ALTER TABLE audit ENABLE TRIGGER USER")
    assert broken.returncode == 1
    assert f"row {number} was altered, or is not where it was written" in broken.stdout
    assert esd("audit", "verify").returncode == 0

    refused = esd("audit", "verify", "--service", "gateway")
    assert refused.stderr == "--service gateway: there is no such audit (possible: identity, models, endpoints)\n"


def made(
    studio: Studio,
    folder: Path,
    task: str = "txt2img",
    models: dict[str, list[str]] | None = None,
    image: int = 0,
    **payload: Any,
) -> Path:
    """A picture of a job, the first one if no other is named, as a file."""
    models = models or {"Stable-diffusion": [studio.model]}
    body = {"task_type": task, "inference_type": "Async", "models": models, "payload_string": json.dumps(payload)}
    started = studio.api.ok("POST", "/inferences", body, 202)
    job = finished(studio.api, started["inference"]["inference_id"])
    assert job["status"] == "succeed", job
    path = folder / f"{job['InferenceJobId']}.png"
    path.write_bytes(studio.api.get(job["img_presigned_urls"][image]))
    return path


@pytest.mark.slow
def test_a_picture_is_made_again_from_what_it_says_of_its_making(esd: Esd, studio: Studio, tmp_path: Path) -> None:
    picture = made(studio, tmp_path, **PICTURE, exclusive=True)
    again = esd("verify", picture, "--user", "painter")
    assert (again.returncode, again.stdout) == (0, f"{picture.name}: bit-equal\n"), again.stderr
    assert "makes image 0 of job" in again.stderr

    image = Image.open(picture)
    chunk = PngInfo()
    chunk.add_text("esd", image.text["esd"])
    image.putpixel((3, 3), (0, 255, 0))
    image.save(tmp_path / "altered.png", pnginfo=chunk)
    altered = esd("verify", tmp_path / "altered.png", "--user", "painter", "--endpoint", studio.endpoint)
    assert altered.returncode == 1
    assert "it must be bit-equal on the same device and versions, but 1 pixels (0.02%) differ" in altered.stderr

    making = json.loads(image.text["esd"])
    making["engine"]["torch"] = "1.0"
    making["models"][0]["sha256"] = "0" * 64
    chunk = PngInfo()
    chunk.add_text("esd", json.dumps(making))
    image.save(tmp_path / "old.png", pnginfo=chunk)
    old = esd("verify", tmp_path / "old.png", "--user", "painter")
    assert old.returncode == 0, old.stderr
    assert f"model {studio.model} (Stable-diffusion) was another file: SHA-256 0000000000000000 then, " in old.stdout
    assert "torch was another: 1.0 then, " in old.stdout
    assert "the same within the tolerance of 30 dB: 1 pixels (0.02%) differ, by at most " in old.stdout

    image.save(tmp_path / "bare.png")
    bare = esd("verify", tmp_path / "bare.png")
    assert (bare.returncode, bare.stdout) == (1, "")
    assert bare.stderr.endswith("it does not say how it was made: the PNG chunk `esd` is missing\n")


@pytest.mark.slow
def test_a_later_picture_of_a_batch_is_made_again_with_all_its_models_and_each_other_file_is_named(
    esd: Esd, studio: Studio, tmp_path: Path
) -> None:
    def put(seed: int) -> dict[tuple[str, str], tuple[str, str]]:
        """Uploads a file of each kind; answers the ids of the checkpoints and the files' SHA-256."""
        found = {}
        for kind, name, write in (
            ("Stable-diffusion", "again.safetensors", tiny.write),
            ("VAE", "colours.safetensors", tiny.write),
            ("Lora", "style.safetensors", tiny_lora.write),
        ):
            path = tmp_path / name
            write(path, seed)
            answer = upload(studio.api, path, checkpoint_type=kind)
            assert answer.status == 200, answer.body
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            found[kind, name] = answer.data["checkpoint"]["id"], sha256[:16]
        return found

    before = put(seed=5)
    models: dict[str, list[str]] = {"Stable-diffusion": [studio.model]}
    for kind, name in before:
        models.setdefault(kind, []).append(name)
    refined = {"refiner_checkpoint": "again", "refiner_switch_at": 0.5}
    payload = PICTURE | refined | {"prompt": "a red circle <lora:style:0.8>", "batch_size": 2, "n_iter": 2}
    picture = made(studio, tmp_path, models=models, image=3, **payload, exclusive=True)
    making = json.loads(Image.open(picture).text["esd"])
    assert {(model["type"], model["name"]) for model in making["models"]} > set(before)
    again = esd("verify", picture, "--user", "painter")
    assert (again.returncode, again.stdout) == (0, f"{picture.name}: bit-equal\n"), again.stderr
    assert "makes image 3 of job" in again.stderr

    ids = [checkpoint_id for checkpoint_id, _ in before.values()]
    studio.api.ok("DELETE", "/checkpoints", {"checkpoint_id_list": ids}, 204)
    after = put(seed=6)
    other = esd("verify", picture, "--user", "painter")
    assert other.returncode == 1
    assert f"{picture.name}: another picture: " in other.stderr
    assert sorted(other.stdout.splitlines()) == sorted(
        f"model {name} ({kind}) was another file: SHA-256 {then} then, {after[kind, name][1]} now"
        for (kind, name), (_, then) in before.items()
    )


@pytest.mark.slow
def test_a_picture_from_a_picture_is_made_again_with_its_payload(esd: Esd, studio: Studio, tmp_path: Path) -> None:
    payload = PICTURE | {"init_images": [encoded(noise())], "denoising_strength": 0.5, "seed": 11}
    picture = made(studio, tmp_path, "img2img", **payload)
    without = esd("verify", picture, "--user", "painter")
    assert without.returncode == 1
    assert (
        "began with pictures of its own, which are not in this one: name its payload with --payload" in without.stderr
    )
    path = tmp_path / "payload.json"
    path.write_text(json.dumps(payload))
    again = esd("verify", picture, "--payload", path, "--user", "painter")
    assert again.returncode == 0, again.stderr
    path.write_text(json.dumps(payload | {"init_images": [encoded(noise(seed=1))]}))
    other = esd("verify", picture, "--payload", path, "--user", "painter")
    assert other.returncode == 1
    assert "init_images differ" in other.stderr
    path.write_text(json.dumps(payload | {"seed": 12, "steps": 7}))
    other = esd("verify", picture, "--payload", path, "--user", "painter")
    assert other.returncode == 1
    assert "is not that of job" in other.stderr
    assert "seed, steps differ" in other.stderr
