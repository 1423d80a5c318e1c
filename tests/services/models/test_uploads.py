"""Uploading checkpoints: opening, completing, inspecting, refusing."""

import asyncio
import hashlib
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import pytest
from google.protobuf.json_format import MessageToDict

from esd.models.v1 import models_pb2 as pb
from services.common.auth import Profile, UsernameStatus
from services.common.errors import InvalidArgument
from services.common.sentences import MAX_SENTENCE
from services.models.checks import Tag, complete_parts, stored_parts
from services.models.rows import CheckpointFile
from tests.services.models.conftest import Running, refused, tag
from tests.services.models.files import MIB, malicious, safetensors, tar, torch_zip, weights, with_header


async def test_a_file_in_one_part_is_uploaded_and_activated(models: Running) -> None:
    content = safetensors()
    created = await models.create(("a.safetensors", 1))
    shown = MessageToDict(created.checkpoint)
    prefix = f"Stable-diffusion/checkpoint/custom/{shown['id']}"
    assert shown["status"] == "Initial"
    assert shown["s3_location"] == f"s3://{models.blobs.bucket}/{prefix}"
    params = shown["params"]
    assert params["creator"] == "ann"
    assert params["message"] == "hello"
    assert datetime.strptime(params["created"], "%Y-%m-%d %H:%M:%S.%f")
    upload = params["multipart_upload"]["a.safetensors"]
    assert (upload["bucket"], upload["key"]) == (models.blobs.bucket, f"{prefix}/a.safetensors")
    url = urlsplit(created.s3_presign_url["a.safetensors"][0])
    assert url.path.endswith("/a.safetensors")
    assert parse_qs(url.query)["X-Amz-Expires"] == ["86400"]

    tags = await models.put(created, "a.safetensors", content)
    answer = await models.update(shown["id"], {"a.safetensors": tags})

    assert (answer.status_code, answer.message) == (200, "OK")
    assert answer.checkpoint.status == "Initial"  # the one before, as the document shows
    assert answer.data.checkpoint == answer.checkpoint
    item = await models.show(shown["id"])
    assert item["status"] == "Active"
    assert item["name"] == ["a.safetensors"]
    assert item["allowed_roles_or_users"] == ["designer"]
    assert float(item["created"]) > 0
    assert item["params"]["n"] == "1"
    assert item["params"]["size"] == {"a.safetensors": str(len(content))}
    assert item["params"]["sha256"] == {"a.safetensors": hashlib.sha256(content).hexdigest()}
    assert item["params"]["format"] == {"a.safetensors": "safetensors"}
    assert item["params"]["architecture"] == {"a.safetensors": "sd_1_5"}
    assert await models.blobs.get(f"{prefix}/a.safetensors") == content


async def test_three_parts_are_put_together_whatever_the_order_of_tags(models: Running) -> None:
    content = safetensors(11 * MIB)
    parts = content[: 5 * MIB], content[5 * MIB : 10 * MIB], content[10 * MIB :]
    created = await models.create(("b.safetensors", 3))
    tags = await models.put(created, "b.safetensors", *parts)
    unquoted = [tag(entry["PartNumber"], entry["ETag"].strip('"')) for entry in reversed(tags)]
    await models.update(created.checkpoint.id, {"b.safetensors": unquoted})
    item = await models.show(created.checkpoint.id)
    assert item["status"] == "Active"
    assert item["params"]["sha256"]["b.safetensors"] == hashlib.sha256(content).hexdigest()


async def test_a_checkpoint_is_active_once_all_its_files_are_complete(models: Running) -> None:
    created = await models.create(("a.safetensors", 1), ("a.yaml", 1))
    first = {"a.safetensors": await models.put(created, "a.safetensors", safetensors())}
    await models.update(created.checkpoint.id, first)
    assert (await models.show(created.checkpoint.id))["status"] == "Initial"
    second = {"a.yaml": await models.put(created, "a.yaml", b"model: {}")}
    answer = await models.update(created.checkpoint.id, second)
    assert answer.checkpoint.status == "Initial"
    assert (await models.show(created.checkpoint.id))["status"] == "Active"


async def test_completing_again_is_fine(models: Running) -> None:
    created = await models.create(("a.safetensors", 1))
    tags = {"a.safetensors": await models.put(created, "a.safetensors", safetensors()), "stranger": []}
    answers = await asyncio.gather(*(models.update(created.checkpoint.id, tags) for _ in range(3)))
    assert {answer.status_code for answer in answers} == {200}
    assert (await models.update(created.checkpoint.id, tags)).checkpoint.status == "Active"
    await models.update(created.checkpoint.id, tags, "Disabled")
    assert (await models.show(created.checkpoint.id))["status"] == "Disabled"
    await models.update(created.checkpoint.id, tags)
    assert (await models.show(created.checkpoint.id))["status"] == "Active"


async def test_a_completion_that_was_cut_short_can_be_repeated(models: Running) -> None:
    created = await models.create(("a.safetensors", 1))
    tags = await models.put(created, "a.safetensors", safetensors())
    upload = created.checkpoint.params["multipart_upload"]["a.safetensors"]
    await models.blobs.complete_multipart(upload["key"], upload["upload_id"], [(1, tags[0]["ETag"])])
    await models.update(created.checkpoint.id, {"a.safetensors": tags})
    assert (await models.show(created.checkpoint.id))["status"] == "Active"


@pytest.mark.parametrize(
    ("ended_by", "content"),
    [
        ("deletion", safetensors()),
        ("deletion", malicious("true")),
        ("deletion", safetensors(21 * MIB)),
        ("refusal", safetensors()),
    ],
    ids=["deletion", "deletion of a bad one", "deletion of a large one", "refusal"],
)
async def test_an_object_that_the_store_completes_when_its_checkpoint_has_ended_is_removed(
    models: Running, monkeypatch: pytest.MonkeyPatch, ended_by: str, content: bytes
) -> None:
    created = await models.create(("a.safetensors", 1), ("b.safetensors", 1))
    checkpoint_id = created.checkpoint.id
    folder = f"Stable-diffusion/checkpoint/custom/{checkpoint_id}/"
    tags = {"a.safetensors": await models.put(created, "a.safetensors", b"x")}
    bad = {"b.safetensors": await models.put(created, "b.safetensors", b"x")}

    async def complete_late(key: str, *upload: Any) -> None:
        monkeypatch.undo()
        if ended_by == "deletion":
            await models.delete([checkpoint_id])
        else:
            async with refused("FAILED_PRECONDITION", "b.safetensors is truncated"):
                await models.update(checkpoint_id, bad)
        await models.emptied(folder)
        await models.blobs.put(key, content)

    monkeypatch.setattr(models.blobs, "complete_multipart", complete_late)
    code, words = (
        ("NOT_FOUND", "not found") if ended_by == "deletion" else ("FAILED_PRECONDITION", "b.safetensors is truncated")
    )
    async with refused(code, checkpoint_id, words):
        await models.update(checkpoint_id, tags)
    assert await models.blobs.find(folder) == []


async def test_the_tar_of_the_original_client_is_accepted(models: Running) -> None:
    packed = tar("models/Stable-diffusion/a.safetensors", safetensors())
    checkpoint_id = await models.upload("a.safetensors", packed)
    item = await models.show(checkpoint_id)
    assert item["status"] == "Active"
    assert item["params"]["size"] == {"a.safetensors": str(len(packed))}


async def test_wrong_tags_are_refused_and_the_upload_stays_open(models: Running) -> None:
    created = await models.create(("b.safetensors", 2))
    checkpoint_id, content = created.checkpoint.id, safetensors(6 * MIB)
    tags = await models.put(created, "b.safetensors", content[: 5 * MIB], content[5 * MIB :])
    for wrong, words in (
        ([tags[0], tag(2, '"0123"')], ["b.safetensors", "0123", "part 2"]),
        ([tags[0]], ["b.safetensors", "part 2 of 2", "missing"]),
        ([], ["b.safetensors", "parts 1, 2 of 2", "missing"]),
        ([*tags, tag(3, '"a"')], ["b.safetensors", "no part 3"]),
        ([*tags, tags[1]], ["b.safetensors", "part 2", "more than once"]),
        ([tags[0], 5], ['multi_parts_tags["b.safetensors"][1]', "not an object"]),
        ([tags[0], {"ETag": "x"}], ['multi_parts_tags["b.safetensors"][1]', "no PartNumber"]),
        ([tag("1", "x")], ['multi_parts_tags["b.safetensors"][0]', "PartNumber is not a whole number"]),
        ([tag(1.5, "x")], ["PartNumber is not a whole number"]),
        ([tag(True, "x")], ["PartNumber is not a whole number"]),
        ([tag(1, 7)], ["ETag is not the text"]),
        ([tag(1, '""')], ["ETag is not the text"]),
    ):
        async with refused("INVALID_ARGUMENT", *words):
            await models.update(checkpoint_id, {"b.safetensors": wrong})
    assert (await models.show(checkpoint_id))["status"] == "Initial"
    await models.update(checkpoint_id, {"b.safetensors": tags})
    assert (await models.show(checkpoint_id))["status"] == "Active"


async def test_tags_of_parts_that_were_never_uploaded_are_refused(models: Running) -> None:
    created = await models.create(("b.safetensors", 1))
    async with refused("INVALID_ARGUMENT", "b.safetensors: part 1 was not uploaded"):
        await models.update(created.checkpoint.id, {"b.safetensors": [tag(1, '"d41d8cd98f00b204e9800998ecf8427e"')]})
    async with refused("INVALID_ARGUMENT", "names none of the checkpoint's files (b.safetensors) but junk"):
        await models.update(created.checkpoint.id, {"junk": []})


@pytest.mark.parametrize("etag", ["9aB-1", "9ab-1", "9AB-1"])
def test_a_part_is_completed_by_the_etag_that_the_object_store_has_for_it(etag: str) -> None:
    assert stored_parts("a", [(1, etag)], {1: "9aB-1"}) == [(1, "9aB-1")]


class _Number(int):
    """A part's number that counts how often it is compared."""

    num_compared = 0
    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        _Number.num_compared += 1
        return int(self) == other


def test_many_tags_are_refused_without_comparing_each_with_each() -> None:
    file = CheckpointFile(checkpoint_id=uuid4(), position=0, name="a", key="a", upload_id="u", parts_number=20)
    with pytest.raises(
        InvalidArgument, match="parts 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 10 more is given more than once"
    ):
        complete_parts(file, [Tag(_Number(number % 20 + 1), "e") for number in range(2000)])
    assert _Number.num_compared < 20 * 2000


async def test_parts_that_are_too_small_are_refused_by_file(models: Running) -> None:
    created = await models.create(("b.safetensors", 2))
    content = safetensors()
    tags = await models.put(created, "b.safetensors", content[:50], content[50:])
    async with refused("INVALID_ARGUMENT", "b.safetensors", "upload its parts again to their URLs"):
        await models.update(created.checkpoint.id, {"b.safetensors": tags})
    assert (await models.show(created.checkpoint.id))["status"] == "Initial"


async def test_a_truncated_file_is_refused_and_can_be_uploaded_again_under_its_name(models: Running) -> None:
    created = await models.create(("a.safetensors", 1), ("other.yaml", 1))
    tags = {"a.safetensors": await models.put(created, "a.safetensors", safetensors()[:-10])}
    reason = "a.safetensors is truncated: 10 of 64 bytes of its tensors are missing"
    async with refused("FAILED_PRECONDITION", reason):
        await models.update(created.checkpoint.id, tags)
    item = await models.show(created.checkpoint.id)
    assert item["status"] == "Disabled"
    assert item["params"]["error"] == reason
    async with asyncio.timeout(120):
        while await models.blobs.find(f"Stable-diffusion/checkpoint/custom/{created.checkpoint.id}/"):  # noqa: ASYNC110
            await asyncio.sleep(0.02)  # the store tells nobody
    async with refused("FAILED_PRECONDITION", "was refused", reason):
        await models.update(created.checkpoint.id, tags)
    again = await models.upload("a.safetensors", safetensors())
    assert (await models.show(again))["status"] == "Active"


async def test_what_a_hostile_file_says_of_itself_is_cut_and_escaped_before_it_is_kept(models: Running) -> None:
    hostile = {f"\0\ud800\u202eü{'x' * 100_000}": {"dtype": "no"}}
    created = await models.create(("a.safetensors", 1))
    tags = {"a.safetensors": await models.put(created, "a.safetensors", with_header(hostile, b""))}
    async with refused("FAILED_PRECONDITION", r"the header's entry of tensor \x00\ud800\u202eüxxx"):
        await models.update(created.checkpoint.id, tags)
    item = await models.show(created.checkpoint.id)
    assert item["status"] == "Disabled"
    assert len(item["params"]["error"]) == MAX_SENTENCE


async def test_code_in_a_pickle_is_refused_and_never_executed(models: Running, tmp_path: Path) -> None:
    created = await models.create(("evil.ckpt", 1))
    content = torch_zip(malicious(f"touch {tmp_path}/executed"))
    tags = {"evil.ckpt": await models.put(created, "evil.ckpt", content)}
    async with refused("FAILED_PRECONDITION", "evil.ckpt has code in its pickle: posix.system"):
        await models.update(created.checkpoint.id, tags)
    assert not (tmp_path / "executed").exists()
    assert (await models.show(await models.upload("good.ckpt", torch_zip(weights()))))["status"] == "Active"


@pytest.mark.parametrize(
    ("tags", "status", "code", "words"),
    [
        ({}, "Active", "INVALID_ARGUMENT", ["multi parts tags is empty"]),
        ({}, "Disabled", "INVALID_ARGUMENT", ["multi parts tags is empty"]),
        ({"a.yaml": []}, "Bogus", "INVALID_ARGUMENT", ['status: instance value ("Bogus") not found in enum']),
        ({"a.yaml": []}, "", "INVALID_ARGUMENT", ["too short"]),
    ],
)
async def test_a_bad_change_of_status_is_refused(
    models: Running, tags: dict[str, Any], status: str, code: str, words: list[str]
) -> None:
    created = await models.create(("a.yaml", 1))
    async with refused(code, *words):
        await models.update(created.checkpoint.id, tags, status)


@pytest.mark.parametrize("unknown", ["5f7a2f6e-0000-4000-8000-000000000000", "no-uuid", "%"])
async def test_an_unknown_id_is_not_found_whatever_its_form(models: Running, unknown: str) -> None:
    async with refused("NOT_FOUND", f"checkpoint not found with id {unknown}"):
        await models.update(unknown, {"a": []})


async def test_a_change_of_nothing_or_of_the_name(models: Running) -> None:
    created = await models.create(("a.safetensors", 1))

    async def change(checkpoint_id: str, **body: str) -> Any:
        request = pb.UpdateCheckpointRequest(checkpoint_id=checkpoint_id, body=pb.UpdateCheckpointBody(**body))
        return await models.stub.UpdateCheckpoint(request, metadata=models.ann)

    answer = await change(created.checkpoint.id)
    assert (answer.status_code, answer.message, answer.HasField("checkpoint")) == (200, "OK", False)
    async with refused("FAILED_PRECONDITION", "only active can update name"):
        await change(created.checkpoint.id, name="b")
    active = await models.upload("c.safetensors", safetensors())
    assert (await change(active, name="c")).message == "no need to update"


async def test_the_webui_finishes_uploads_without_naming_anybody(models: Running) -> None:
    created = await models.create(("a.safetensors", 1))
    tags = {"a.safetensors": await models.put(created, "a.safetensors", safetensors())}
    nobody = models.tokens.user("api", profile=Profile.WEBUI, username_status=UsernameStatus.ABSENT, impersonate=True)
    await models.update(created.checkpoint.id, tags, by=nobody)
    assert (await models.show(created.checkpoint.id))["status"] == "Active"


async def test_a_last_part_of_no_bytes_is_fine(models: Running) -> None:
    content = safetensors(6 * MIB)
    created = await models.create(("even.safetensors", 2))
    tags = await models.put(created, "even.safetensors", content, b"")
    assert all(value["ETag"].startswith('"') for value in tags), "quotes and all"
    await models.update(created.checkpoint.id, {"even.safetensors": tags})
    item = await models.show(created.checkpoint.id)
    assert item["status"] == "Active"
    assert item["params"]["sha256"] == {"even.safetensors": hashlib.sha256(content).hexdigest()}
    assert item["params"]["kind"] == {"even.safetensors": "checkpoint"}


async def test_nothing_is_aborted_after_completion(models: Running) -> None:
    created = await models.create(("kept.safetensors", 1))
    tags = {"kept.safetensors": await models.put(created, "kept.safetensors", safetensors())}
    await models.update(created.checkpoint.id, tags)
    key = f"Stable-diffusion/checkpoint/custom/{created.checkpoint.id}/kept.safetensors"
    assert (await models.blobs.head(key)).size_bytes == len(safetensors())
    for status in ("Disabled", "Active"):
        await models.update(created.checkpoint.id, tags, status)
        assert (await models.show(created.checkpoint.id))["status"] == status
    assert (await models.blobs.head(key)).size_bytes == len(safetensors())
