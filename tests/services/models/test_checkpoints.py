"""Creating, listing, resolving and deleting checkpoints."""

import asyncio
import struct
from typing import Any

import grpc
import pytest
from google.protobuf import struct_pb2
from google.protobuf.json_format import MessageToDict, ParseDict

from esd.models.v1 import models_pb2 as pb
from services.common.errors import Unavailable
from tests.services.models.conftest import Running, refused
from tests.services.models.files import safetensors


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"checkpoint_type": "Model"}, ['instance value ("Model") not found in enum']),
        ({"checkpoint_type": None}, ['missing required properties (["checkpoint_type"])']),
        ({"params": None}, ['missing required properties (["params"])']),
        ({"filenames": []}, ["filenames or urls"]),
        (
            {"filenames": [{"filename": "a"}]},
            ['filenames[0]: object has missing required properties (["parts_number"])'],
        ),
        ({"filenames": [{"filename": "a", "parts_number": 0}]}, ["minimum: 1, found: 0"]),
        ({"filenames": [{"filename": "a", "parts_number": 101}]}, ["maximum: 100, found: 101"]),
        ({"filenames": [{"filename": "", "parts_number": 1}]}, ["filenames[0].filename", "too short"]),
        ({"filenames": [{"filename": "../a", "parts_number": 1}]}, ["filenames[0].filename", "does not match"]),
        ({"filenames": [{"filename": "a\\b", "parts_number": 1}]}, ["does not match"]),
        ({"filenames": [{"filename": "a\0b", "parts_number": 1}]}, ["NUL"]),
        ({"filenames": [{"filename": "..", "parts_number": 1}]}, ['".." cannot be the name of a file']),
        ({"filenames": [{"filename": "  ", "parts_number": 1}]}, ["cannot be the name of a file"]),
        ({"filenames": [{"filename": "ü" * 200, "parts_number": 1}]}, ["400 bytes, 255 are allowed"]),
        # The object store would list no uploads any more, of nobody: its answer would be no XML.
        *(
            ({"filenames": [{"filename": name, "parts_number": 1}]}, [f"filename {name!a}", "characters that nobody"])
            for name in ("a\ufffe.pt", "\uffff")
        ),
        ({"filenames": [{"filename": f"{n}", "parts_number": 1} for n in range(21)]}, ["at most 20 elements"]),
        ({"params": {"message": "a\0b"}}, ["NUL"]),
        ({"params": {"list": [{"a\0b": 1}]}}, ["NUL"]),
        ({"params": {"message": "x" * 70_000}}, ["params", "65536 are allowed"]),
        ({"params": {"list": [[]] * 100}}, ["params: 102 values are too many, 100 are allowed"]),
    ],
)
async def test_a_bad_request_is_refused_in_words(models: Running, changes: dict[str, Any], words: list[str]) -> None:
    body = {
        "checkpoint_type": "Lora",
        "filenames": [{"filename": "a.safetensors", "parts_number": 1}],
        "params": {"message": "m"},
    } | changes
    request = ParseDict({key: value for key, value in body.items() if value is not None}, pb.CreateCheckpointRequest())
    async with refused("INVALID_ARGUMENT", *words):
        await models.stub.CreateCheckpoint(request, metadata=models.ann)
    assert (await models.list()).total == 0


async def test_a_request_is_judged_before_its_sender_is(models: Running) -> None:
    guest = models.tokens.user("gus", [], [])
    asked = pb.CreateCheckpointRequest(checkpoint_type="Lora", urls=["https://models.example/a.safetensors"])
    content = [pb.DatasetUpload(filename="a", name="a", type="image", params={})]
    for request, method in (
        (asked, models.stub.CreateCheckpoint),
        (pb.CreateDatasetRequest(dataset_name="d", content=content), models.stub.CreateDataset),
    ):
        async with refused("INVALID_ARGUMENT", '[object has missing required properties (["params"])]'):
            await method(request, metadata=guest)
        request.params.SetInParent()
        async with refused("PERMISSION_DENIED"):
            await method(request, metadata=guest)


@pytest.mark.parametrize("bits", ["7ff8000000000000", "7ff8010101010101", "fff8010101010101", "fff0000000000000"])
async def test_numbers_that_json_cannot_hold_are_refused(models: Running, bits: str) -> None:
    request = pb.CreateCheckpointRequest(
        checkpoint_type="Lora", filenames=[pb.CheckpointFile(filename="a", parts_number=1)]
    )
    request.params.fields["n"].CopyFrom(struct_pb2.Value(number_value=struct.unpack(">d", bytes.fromhex(bits))[0]))
    async with refused("INVALID_ARGUMENT", "not finite"):
        await models.stub.CreateCheckpoint(request, metadata=models.ann)


async def test_a_name_belongs_to_one_file_of_all_checkpoints(models: Running) -> None:
    await models.create(("a.safetensors", 1))
    used = "a.safetensors already exists, please use another or rename/delete exists"
    async with refused("FAILED_PRECONDITION", used):
        await models.create((" a.safetensors ", 1), kind="Lora", by=models.bob)
    async with refused("INVALID_ARGUMENT", "filenames: b is given more than once"):
        await models.create(("b", 1), (" b", 1))
    results = await asyncio.gather(*(models.create(("c", 1)) for _ in range(4)), return_exceptions=True)
    errors = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]
    assert len(errors) == 3
    assert {error.code() for error in errors} == {grpc.StatusCode.FAILED_PRECONDITION}
    assert (await models.list()).total == 2


async def test_pages_are_counted_and_sorted_newest_first(models: Running) -> None:
    none = await models.list()
    assert (none.page, none.per_page, none.pages, none.total) == (1, 10, 0, 0)
    ids = [(await models.create((f"{n}.yaml", 1), kind="VAE")).checkpoint.id for n in range(4)]
    page = await models.list(page="2", per_page="2")
    assert (page.page, page.per_page, page.pages, page.total) == (2, 2, 2, 4)
    assert [item.id for item in page.checkpoints] == [ids[1], ids[0]]
    assert (await models.list(page="3", per_page="2")).checkpoints == []
    assert (await models.list(page="", per_page="3")).pages == 2
    assert (await models.list(types=["", "VAE"], status=["Initial"], roles=["designer"])).total == 4
    assert (await models.list(types=["Lora"])).total == 0
    assert (await models.list(status=["Active"])).total == 0
    assert (await models.list(roles=["guest"])).total == 0


@pytest.mark.parametrize("name", ["page", "per_page"])
@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5", "\u0661", "99999999999"])
async def test_a_page_that_is_no_number_is_refused(models: Running, name: str, value: str) -> None:
    async with refused("INVALID_ARGUMENT", f'{name}: "{value}" is not a whole number'):
        await models.list(**{name: value})


@pytest.mark.parametrize("query", [{"username": "a\0"}, {"types": ["\0"]}, {"status": ["\0"]}, {"roles": ["\0"]}])
async def test_a_nul_in_a_query_is_refused(models: Running, query: dict[str, Any]) -> None:
    async with refused("INVALID_ARGUMENT", "NUL"):
        await models.list(**query)


async def test_callers_see_what_their_roles_own(models: Running) -> None:
    await models.create(("ann", 1))
    await models.create(("bob", 1), by=models.bob)

    async def names(**query: Any) -> list[str]:
        shown = MessageToDict(await models.list(**query)).get("checkpoints", [])
        return sorted(name for item in shown for name in item["name"])

    assert await names(by=models.ann) == ["ann"]
    assert await names(by=models.bob) == ["bob"]
    assert await names(by=models.admin) == ["ann", "bob"]
    assert await names(by=models.ann, username="ann") == ["ann"]
    assert await names(by=models.ann, username="bob") == []
    assert await names(by=models.ann, username="root") == ["ann"]
    assert await names(by=models.admin, username="bob") == ["ann", "bob"]
    async with refused("INVALID_ARGUMENT", 'user: "carl" not exist'):
        await names(by=models.ann, username="carl")


async def test_a_deletion_is_done_at_once_and_its_objects_go_when_the_store_answers(
    models: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint_id = await models.upload("a.safetensors", safetensors())
    folder = f"Stable-diffusion/checkpoint/custom/{checkpoint_id}/"
    was_refused, answers, delete = asyncio.Event(), asyncio.Event(), models.blobs.delete_prefix

    async def delete_if_it_answers(prefix: str) -> int:
        if not answers.is_set():
            was_refused.set()
            raise Unavailable("the store is away")
        return await delete(prefix)

    monkeypatch.setattr(models.blobs, "delete_prefix", delete_if_it_answers)
    await models.delete([checkpoint_id])
    assert (await models.list()).total == 0
    await asyncio.wait_for(was_refused.wait(), 60)
    assert len(await models.blobs.find(folder)) == 1
    answers.set()
    await models.emptied(folder)


async def test_others_can_neither_change_nor_delete(models: Running) -> None:
    checkpoint_id = (await models.create(("a.yaml", 1))).checkpoint.id
    own = (await models.create(("b.yaml", 1), by=models.bob)).checkpoint.id
    async with refused("PERMISSION_DENIED", checkpoint_id, "designer", "bob"):
        await models.update(checkpoint_id, {"a.yaml": []}, by=models.bob)
    async with refused("PERMISSION_DENIED", checkpoint_id, "designer", "bob"):
        await models.delete([own, checkpoint_id], by=models.bob)
    assert (await models.list()).total == 2
    await models.delete([checkpoint_id, own], by=models.admin)
    assert (await models.list()).total == 0


async def test_deleting_removes_objects_and_open_uploads_and_frees_names(models: Running) -> None:
    done = await models.upload("a.safetensors", safetensors())
    opened = await models.create(("b.yaml", 1))
    await models.put(opened, "b.yaml", b"x")
    await models.delete([done, done, opened.checkpoint.id, "no-uuid", "5f7a2f6e-0000-4000-8000-000000000000"])
    assert (await models.list()).total == 0
    for checkpoint_id in (done, opened.checkpoint.id):
        await models.emptied(f"Stable-diffusion/checkpoint/custom/{checkpoint_id}/")
    with pytest.raises(AssertionError):
        await models.put(opened, "b.yaml", b"x")  # its URL leads nowhere now
    await models.create(("a.safetensors", 1), ("b.yaml", 1))


async def test_services_resolve_active_files_that_the_user_may_use(models: Running) -> None:
    content = safetensors()
    checkpoint_id = await models.upload("a.safetensors", content)
    await models.create(("open.safetensors", 1))

    async def resolve(*names: str, roles: tuple[str, ...] = ("designer",), all_of_it: bool = False) -> Any:
        request = pb.ResolveCheckpointsRequest(
            names=[pb.CheckpointName(type=kind, name=name) for kind, name in (name.split(":") for name in names)],
            username="ann",
            roles=roles,
            sees_everything=all_of_it,
        )
        return await models.stub.ResolveCheckpoints(request, metadata=models.tokens.service("inference"))

    found = await resolve("VAE:a.safetensors", "Stable-diffusion:a.safetensors", "Stable-diffusion:open.safetensors")
    assert [name.type for name in found.missing] == ["VAE", "Stable-diffusion"]
    (one,) = found.checkpoints
    assert (one.id, one.type, one.name) == (checkpoint_id, "Stable-diffusion", "a.safetensors")
    assert one.key == f"Stable-diffusion/checkpoint/custom/{checkpoint_id}/a.safetensors"
    assert one.s3_location == f"s3://{models.blobs.bucket}/Stable-diffusion/checkpoint/custom/{checkpoint_id}"
    assert list(one.all_names) == ["a.safetensors"]
    assert one.size_bytes == len(content)
    assert len(one.sha256) == 64
    name = "Stable-diffusion:a.safetensors"
    assert [missing.name for missing in (await resolve(name, roles=())).missing] == ["a.safetensors"]
    assert len((await resolve(name, name, roles=(), all_of_it=True)).checkpoints) == 2
    assert await resolve() == pb.ResolveCheckpointsResponse()
    async with refused("PERMISSION_DENIED"):
        await models.stub.ResolveCheckpoints(pb.ResolveCheckpointsRequest(), metadata=models.admin)


async def test_a_backslash_before_u0000_is_no_nul(models: Running) -> None:
    request = pb.CreateCheckpointRequest(
        checkpoint_type="Lora",
        filenames=[pb.CheckpointFile(filename="a", parts_number=1)],
        params={"message": "\\u0000", "n": 1},
    )
    created = await models.stub.CreateCheckpoint(request, metadata=models.ann)
    assert created.checkpoint.params["message"] == "\\u0000"
