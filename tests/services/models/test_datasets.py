"""Datasets: the five routes over a real database and object store."""

import asyncio
import base64
import json
from collections.abc import Iterable
from typing import Any
from urllib.parse import parse_qs, urlsplit

import grpc
import httpx
import pytest
import sqlalchemy as sa
from google.protobuf.json_format import MessageToDict, ParseDict

from esd.models.v1 import models_pb2 as pb
from services.common.auth import Profile, UsernameStatus
from services.common.database import Database
from services.models import dataset_store
from tests.services.models.conftest import Running, refused
from tests.serving import Metadata

FILES = [("1.png", b"a picture"), ("1.txt", b"a caption")]


async def _create(
    models: Running, name: str, by: Metadata, files: Iterable[str] = ("1.png",), **changes: Any
) -> pb.CreateDatasetResponse:
    content = [{"filename": file, "name": f"shown {file}", "type": "image", "params": {"n": 1}} for file in files]
    body = {"dataset_name": name, "content": content, "creator": "me", "prefix": "", "params": {}} | changes
    request = ParseDict({key: value for key, value in body.items() if value is not None}, pb.CreateDatasetRequest())
    return await models.stub.CreateDataset(request, metadata=by)


async def _upload(created: pb.CreateDatasetResponse, files: Iterable[tuple[str, bytes]]) -> None:
    async with httpx.AsyncClient() as client:
        for name, content in files:
            (await client.put(created.s3_presign_url[name], content=content)).raise_for_status()


async def _list(models: Running, by: Metadata, **query: str) -> tuple[list[str], str | None]:
    answer = await models.stub.ListDatasets(pb.ListDatasetsRequest(**query), metadata=by)
    key = answer.last_evaluated_key
    return [item["datasetName"] for item in answer.datasets], key.string_value if key.HasField("string_value") else None


async def _get(models: Running, name: str, by: Metadata) -> dict[str, Any]:
    answer = await models.stub.GetDataset(pb.GetDatasetRequest(dataset_name=name), metadata=by)
    return MessageToDict(answer)["data"]


async def _update(models: Running, name: str, status: str, by: Metadata) -> pb.UpdateDatasetResponse:
    request = pb.UpdateDatasetRequest(dataset_name=name, body=pb.UpdateDatasetBody(status=status))
    return await models.stub.UpdateDataset(request, metadata=by)


async def _delete(models: Running, names: list[str], by: Metadata) -> None:
    await models.stub.DeleteDatasets(pb.DeleteDatasetsRequest(dataset_name_list=names), metadata=by)


async def test_the_files_make_the_folder_that_the_trainer_reads(models: Running) -> None:
    params = {"description": "my cat"}
    created = await _create(models, "cat", models.ann, ["1.png", "1.txt"], prefix="10_cat", params=params)
    assert created.dataset_name == "cat"
    assert parse_qs(urlsplit(created.s3_presign_url["1.png"]).query)["X-Amz-Expires"] == [str(7 * 24 * 3600)]
    await _upload(created, FILES)
    found = await models.blobs.find("dataset/cat/")
    assert [blob.key for blob in found] == ["dataset/cat/10_cat/1.png", "dataset/cat/10_cat/1.txt"]

    shown = await _get(models, "cat", models.ann)
    assert (shown["dataset_name"], shown["datasetName"], shown["prefix"]) == ("cat", "cat", "10_cat")
    assert shown["s3"] == f"s3://{models.blobs.bucket}/dataset/cat/10_cat"
    assert (shown["status"], shown["description"]) == ("Initialed", "my cat")
    assert float(shown["timestamp"]) > 0
    picture, caption = shown["data"]
    assert picture["key"] == f"{shown['timestamp']}_shown 1.png"
    assert (picture["name"], picture["type"], picture["dataStatus"]) == ("shown 1.png", "image", "Initialed")
    assert (picture["n"], picture["original_file_name"]) == ("1", "1.png")
    async with httpx.AsyncClient() as client:
        assert (await client.get(picture["preview_url"])).content == b"a picture"
        assert (await client.get(caption["preview_url"])).content == b"a caption"
    assert parse_qs(urlsplit(picture["preview_url"]).query)["X-Amz-Expires"] == [str(24 * 3600)]


async def test_a_description_is_always_there(models: Running) -> None:
    await _create(models, "bare", models.ann)
    await _create(models, "odd", models.ann, params={"description": 3})
    for name in ("bare", "odd"):
        assert (await _get(models, name, models.ann))["description"] == ""
    answer = await models.stub.ListDatasets(pb.ListDatasetsRequest(), metadata=models.ann)
    assert {item["description"] for item in answer.datasets} == {""}
    shown = await _get(models, "bare", models.ann)
    assert (shown["prefix"], shown["s3"]) == ("", f"s3://{models.blobs.bucket}/dataset/bare")


async def test_params_are_shown_among_the_fields_and_hide_none_of_them(models: Running) -> None:
    params = {"description": "d", "note": {"n": 1, "deep": [2.5, None, True]}, "status": "mine", "data": 5}
    await _create(models, "more", models.ann, params=params)
    (listed,) = (await models.stub.ListDatasets(pb.ListDatasetsRequest(), metadata=models.ann)).datasets
    for shown in (MessageToDict(listed), await _get(models, "more", models.ann)):
        assert shown["note"] == {"n": "1", "deep": ["2.5", None, True]}
        assert (shown["status"], shown["description"]) == ("Initialed", "d")
    assert [item["name"] for item in (await _get(models, "more", models.ann))["data"]] == ["shown 1.png"]


async def test_five_hundred_files_are_taken_and_one_more_is_not(models: Running) -> None:
    names = [f"{n}.png" for n in range(500)]
    assert set((await _create(models, "many", models.ann, names)).s3_presign_url) == set(names)
    assert [item["original_file_name"] for item in (await _get(models, "many", models.ann))["data"]] == names
    async with refused("INVALID_ARGUMENT", "at most 500 elements"):
        await _create(models, "more", models.ann, [*names, "500.png"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset_name": None}, 'missing required properties (["dataset_name"])'),
        ({"dataset_name": ""}, "too short"),
        ({"dataset_name": "x" * 21}, "too long"),
        ({"dataset_name": "1x"}, "does not match"),
        ({"dataset_name": "a/b"}, "does not match"),
        ({"content": None}, 'missing required properties (["content"])'),
        ({"content": []}, 'missing required properties (["content"])'),
        ({"content": [{"filename": "a", "name": "a", "type": "t"}]}, "content[0]: object has missing required pr"),
        ({"content": [{"filename": "a/b", "name": "a", "type": "t", "params": {}}]}, "content[0].filename"),
        (
            {"content": [{"filename": "a", "name": "a", "type": "t", "params": {"n": [1] * 20}}]},
            "params: 22 values are too many, 20 are allowed",
        ),
        ({"content": [{"filename": "..", "name": "a", "type": "t", "params": {}}]}, '".." cannot be'),
        ({"content": [{"filename": "x" * 256, "name": "a", "type": "t", "params": {}}]}, "too long"),
        (
            {"content": [{"filename": "a", "name": "a", "type": "t", "params": {"x": "y" * 5_000}}]},
            "content[0].params: 50",
        ),
        ({"content": [{"filename": n, "name": "a", "type": "t", "params": {}} for n in ("a", "a ")]}, "more than once"),
        ({"prefix": "../other"}, 'prefix "../other" cannot be'),
        ({"prefix": "a//b"}, "cannot be the name of a folder"),
        ({"prefix": "a\\b"}, "cannot be the name of a folder"),
        ({"prefix": "ü" * 200}, "400 bytes, 255 are allowed"),
        ({"params": None}, 'missing required properties (["params"])'),
        ({"params": {"description": "x" * 70_000}}, "65536 are allowed"),
    ],
)
async def test_a_bad_dataset_is_refused_in_words(models: Running, changes: dict[str, Any], words: str) -> None:
    async with refused("INVALID_ARGUMENT", words):
        await _create(models, **({"name": "d", "by": models.ann} | changes))
    assert await _list(models, models.admin) == ([], None)


async def test_creating_again_replaces_what_is_known_and_adds_files(models: Running) -> None:
    await _create(models, "d", models.ann, ["a.png", "b.png"], prefix="1_a", params={"description": "old"})
    await _update(models, "d", "Enabled", models.ann)
    await _create(models, "d", models.ann, ["b.png", "c.png"], prefix="1_a", params={"description": "new"})
    shown = await _get(models, "d", models.ann)
    assert (shown["description"], shown["status"]) == ("new", "Initialed")
    assert [item["original_file_name"] for item in shown["data"]] == ["a.png", "b.png", "c.png"]


async def test_who_adds_files_to_a_dataset_of_others_does_not_take_it_from_them(models: Running) -> None:
    await _create(models, "d", models.ann, ["a.png"])
    await _create(models, "d", models.admin, ["b.png"])
    assert len((await _get(models, "d", models.ann))["data"]) == 2
    operator = models.tokens.user("olga", ["train:all"], ["IT Operator"])
    async with refused("PERMISSION_DENIED", "no permission to view dataset"):
        await _get(models, "d", operator)


async def test_the_status_of_a_dataset_is_that_of_its_files(models: Running) -> None:
    await _create(models, "d", models.ann)
    answer = await _update(models, "d", "Enabled", models.ann)
    assert (answer.dataset_name, answer.status) == ("d", "Enabled")
    shown = await _get(models, "d", models.ann)
    assert (shown["status"], shown["data"][0]["dataStatus"]) == ("Enabled", "Enabled")
    async with refused("INVALID_ARGUMENT", "[status: instance value", "not found in enum"):
        await _update(models, "d", "Active", models.ann)
    async with refused("NOT_FOUND", "dataset x is not found"):
        await _update(models, "x", "Enabled", models.ann)


async def test_the_list_filters_before_it_limits_and_its_cursor_reaches_the_end(models: Running) -> None:
    for n in range(7):
        await _create(models, f"d{n}", models.ann)
        if n % 2:
            await _update(models, f"d{n}", "Enabled", models.ann)
    assert await _list(models, models.ann) == ([f"d{n}" for n in range(6, -1, -1)], None)
    page, key = await _list(models, models.ann, dataset_status="Enabled", limit="2")
    assert page == ["d5", "d3"]
    assert key
    await _create(models, "newer", models.ann)
    rest = await _list(models, models.ann, dataset_status="Enabled", limit="2", exclusive_start_key=key)
    assert rest == (["d1"], None)
    for everything in ("0", "-1", "100"):
        assert len((await _list(models, models.ann, limit=everything))[0]) == 8
    for limit in ("x", "1.5"):
        async with refused("INVALID_ARGUMENT", "is not a number"):
            await _list(models, models.ann, limit=limit)
    others = [{"dataset_name": name, "timestamp": "2026-01-01 00:00:00.000000"} for name in ("d\0", "\ud800", "", 7)]
    for bad in ("x", "e30=", "bnVsbA==", "ü", *(base64.b64encode(json.dumps(of).encode()).decode() for of in others)):
        async with refused("INVALID_ARGUMENT", "exclusive_start_key"):
            await _list(models, models.ann, exclusive_start_key=bad)


async def test_a_dataset_is_for_its_creators_roles_and_for_administrators(models: Running) -> None:
    colleague = models.tokens.user("cora", ["train:all"], ["designer"])
    ann, bob = (models.tokens.user(name, ["train:all"], [role]) for name, role in (("ann", "designer"), ("bob", "g")))
    admin = models.tokens.user("root", ["train:all", "user:all"])
    created = await _create(models, "d", ann)
    await _upload(created, FILES[:1])
    for seer in (ann, colleague, admin):
        assert await _list(models, seer) == (["d"], None)
        assert (await _get(models, "d", seer))["status"] == "Initialed"
    assert await _list(models, bob) == ([], None)
    hidden = "no permission to view dataset"
    async with refused("PERMISSION_DENIED", hidden):
        await _get(models, "d", bob)
    async with refused("PERMISSION_DENIED", hidden):
        await _update(models, "d", "Enabled", bob)
    async with refused("PERMISSION_DENIED", hidden):
        await _create(models, "d", bob, ["evil.png"])
    await _create(models, "bobs", bob)
    async with refused("PERMISSION_DENIED", hidden):
        await _delete(models, ["bobs", "d"], bob)
    assert await _list(models, admin) == (["bobs", "d"], None)
    assert len((await _get(models, "d", ann))["data"]) == 1
    async with refused("PERMISSION_DENIED", "['train:all']"):
        await _list(models, models.tokens.user("dora", ["checkpoint:all"]))


async def test_deleting_takes_rows_and_objects_and_nothing_of_others(models: Running) -> None:
    for name in ("a", "ab"):
        await _upload(await _create(models, name, models.ann, ["1.png", "1.txt"], prefix="1_x"), FILES)
    await _delete(models, ["a", "a", "unknown"], models.ann)
    assert await _list(models, models.ann) == (["ab"], None)
    assert await models.blobs.find("dataset/a/") == []
    assert len(await models.blobs.find("dataset/ab/")) == 2
    async with refused("NOT_FOUND", "dataset a is not found"):
        await _get(models, "a", models.ann)
    for names in ([], ["1"], ["x" * 21], [f"d{n}" for n in range(11)]):
        async with refused("INVALID_ARGUMENT"):
            await _delete(models, names, models.ann)


async def _set_kept(database: Database, change: str) -> None:
    async with database.transaction() as session:
        await session.execute(sa.text(f"UPDATE kept_dataset_names SET {change}"))


async def _free_again(database: Database) -> None:
    """Waits until no name is kept."""
    async with asyncio.timeout(120):
        while True:
            async with database.transaction() as session:
                if not (await session.execute(sa.text("SELECT name FROM kept_dataset_names"))).all():
                    return
            await asyncio.sleep(0.05)


async def test_the_name_of_a_deleted_dataset_is_its_owners_while_their_urls_can_write_there(
    service: tuple[Running, Database], models: Running
) -> None:
    _, database = service
    bob = models.tokens.user("bob", ["train:all"], ["guest"])
    left_over = await _create(models, "d", models.ann)
    await _delete(models, ["d"], models.ann)
    async with refused("FAILED_PRECONDITION", "dataset d was deleted", "choose another name"):
        await _create(models, "d", bob)
    assert await _list(models, models.admin) == ([], None)
    await _create(models, "d", models.ann)
    await _upload(left_over, FILES[:1])
    await _delete(models, ["d"], models.ann)
    await _set_kept(database, "until = now()")
    await _free_again(database)
    await _create(models, "d", bob)


async def test_what_comes_late_into_a_deleted_dataset_is_gone_before_its_name_is_free(
    service: tuple[Running, Database], models: Running
) -> None:
    _, database = service
    bob = models.tokens.user("bob", ["train:all"], ["guest"])
    left_over = await _create(models, "d", models.ann)
    await _delete(models, ["d"], models.ann)
    await _upload(left_over, FILES[:1])
    assert len(await models.blobs.find("dataset/d/")) == 1
    await _set_kept(database, "until = now()")
    await _free_again(database)
    assert await models.blobs.find("dataset/d/") == []
    await _create(models, "d", bob)


async def test_a_deletion_that_was_cut_short_is_finished_and_nobody_adds_files_meanwhile(
    service: tuple[Running, Database], models: Running
) -> None:
    _, database = service
    left_over = await _create(models, "d", models.ann)
    await _delete(models, ["d"], models.ann)
    await _upload(left_over, FILES[:1])
    # As a process leaves it that died while it emptied the folder.
    await _set_kept(database, "emptying_until = now() + interval '1 hour'")
    for by in (models.ann, models.admin):
        async with refused("FAILED_PRECONDITION", "dataset d is being deleted"):
            await _create(models, "d", by)
    assert await _list(models, models.admin) == ([], None)
    await _set_kept(database, "emptying_until = now()")
    async with asyncio.timeout(120):
        while await models.blobs.find("dataset/d/"):  # noqa: ASYNC110 - the store tells nobody
            await asyncio.sleep(0.05)
    await _set_kept(database, "emptying_until = NULL")  # what comes next, and need not be waited for
    await _create(models, "d", models.ann)


async def test_the_webui_client_deletes_without_naming_anybody(models: Running) -> None:
    await _create(models, "d", models.ann)
    nobody = models.tokens.user(
        "api", [], profile=Profile.WEBUI, username_status=UsernameStatus.ABSENT, impersonate=True
    )
    async with refused("UNAUTHENTICATED"):
        await _get(models, "d", nobody)
    await _delete(models, ["d"], nobody)
    assert await _list(models, models.admin) == ([], None)


async def test_a_dataset_has_so_many_files_at_most(models: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_store, "MAX_ITEMS", 3)
    await _create(models, "d", models.ann, ["1.png", "2.png"])
    await _create(models, "d", models.ann, ["2.png", "3.png"])
    async with refused("FAILED_PRECONDITION", "dataset d would have 5 files, 3 are possible"):
        await _create(models, "d", models.ann, ["4.png", "5.png"])
    assert len((await _get(models, "d", models.ann))["data"]) == 3


async def test_two_who_create_the_same_name_at_once_share_nothing(models: Running) -> None:
    bob = models.tokens.user("bob", ["train:all"], ["guest"])
    both = (models.ann, ["anns.png"]), (bob, ["bobs.png"])
    results = await asyncio.gather(*(_create(models, "d", *of) for of in both), return_exceptions=True)
    (failed,) = [result for result in results if isinstance(result, BaseException)]
    assert isinstance(failed, grpc.aio.AioRpcError)
    assert failed.code() == grpc.StatusCode.PERMISSION_DENIED
    loser = results.index(failed)
    (owner, files), (other, _) = both[1 - loser], both[loser]
    assert [item["original_file_name"] for item in (await _get(models, "d", owner))["data"]] == files
    async with refused("PERMISSION_DENIED", "no permission to view dataset"):
        await _get(models, "d", other)
