"""Renaming a checkpoint: the name at once, the object in the background, over real parts."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import grpc
import pytest
import sqlalchemy as sa
from botocore.exceptions import ClientError

from esd.models.v1 import models_pb2 as pb
from services.common.audit import Audit
from services.common.blobs import BlobNotFound, Blobs
from services.common.database import Database
from services.common.errors import InvalidArgument, Unavailable
from services.models.background import Background
from services.models.chores import Chores
from services.models.domain import Models
from services.models.rows import ACTIVE, Checkpoint, CheckpointFile
from services.models.store import ModelStore
from tests.conftest import S3Access
from tests.services.models.conftest import RENAMED_KEEP_HOURS, Running, refused
from tests.services.models.files import safetensors
from tests.serving import AUDIT_KEY, Metadata


async def _rename(models: Running, checkpoint_id: str, name: str, by: Metadata | None = None) -> tuple[int, str]:
    body = pb.UpdateCheckpointBody(name=name)
    request = pb.UpdateCheckpointRequest(checkpoint_id=checkpoint_id, body=body)
    answer = await models.stub.UpdateCheckpoint(request, metadata=by or models.ann)
    assert not answer.HasField("checkpoint")
    return answer.status_code, answer.message


async def _keys(models: Running, checkpoint_id: str, *expected: str) -> list[str]:
    """The names of the objects, once they are those expected."""
    prefix = f"Stable-diffusion/checkpoint/custom/{checkpoint_id}/"
    async with asyncio.timeout(120):
        while True:
            found = [blob.key.removeprefix(prefix) for blob in await models.blobs.find(prefix)]
            if found == sorted(expected):
                return found
            await asyncio.sleep(0.02)  # the store tells nobody


async def _resolved(models: Running, name: str) -> Any:
    request = pb.ResolveCheckpointsRequest(
        names=[pb.CheckpointName(type="Stable-diffusion", name=name)], username="ann", roles=["designer"]
    )
    answer = await models.stub.ResolveCheckpoints(request, metadata=models.tokens.service("inference"))
    return next(iter(answer.checkpoints), None)


async def _let_the_old_ones_go(service: tuple[Running, Database]) -> None:
    """Makes it late enough for the objects at old keys to be removed."""
    late = f"scheduled_at > now() + interval '{RENAMED_KEEP_HOURS - 1} hours'"
    due = f"UPDATE chores.procrastinate_jobs SET scheduled_at = now() WHERE task_name = 'remove_object' AND {late}"
    async with asyncio.timeout(120):
        while True:
            async with service[1].transaction() as session:
                await session.execute(sa.text("SET LOCAL search_path TO public, chores"))
                if (await session.execute(sa.text(due + " RETURNING id"))).first():
                    return
            await asyncio.sleep(0.02)  # the object is there before the row that says so


async def test_a_rename_keeps_the_extension_and_moves_the_object(
    models: Running, service: tuple[Running, Database]
) -> None:
    content = safetensors()
    checkpoint_id = await models.upload("old.safetensors", content)
    assert await _rename(models, checkpoint_id, "new") == (202, "rename is processing, please wait")
    shown = await models.show(checkpoint_id)
    assert (shown["name"], shown["status"]) == (["new.safetensors"], "Active")
    await _keys(models, checkpoint_id, "new.safetensors", "old.safetensors")
    await _let_the_old_ones_go(service)
    await _keys(models, checkpoint_id, "new.safetensors")
    found = await _resolved(models, "new.safetensors")
    assert found.key.endswith("/new.safetensors")
    assert await models.blobs.get(found.key) == content
    assert await _resolved(models, "old.safetensors") is None
    params = (await models.show(checkpoint_id))["params"]
    for word in ("multipart_upload", "size", "sha256", "format", "architecture"):
        assert list(params[word]) == ["new.safetensors"], word
    assert params["multipart_upload"]["new.safetensors"]["key"] == found.key
    await models.upload("old.safetensors", content)  # the name is free


async def test_what_was_queued_with_the_old_name_finds_the_object_where_it_was(models: Running) -> None:
    content = safetensors()
    checkpoint_id = await models.upload("old.safetensors", content)
    queued = await _resolved(models, "old.safetensors")
    await _rename(models, checkpoint_id, "new")
    await _keys(models, checkpoint_id, "new.safetensors", "old.safetensors")
    assert await models.blobs.get(queued.key) == content
    await models.delete([checkpoint_id])
    await _keys(models, checkpoint_id)


async def test_only_the_first_file_is_renamed(models: Running) -> None:
    created = await models.create(("a.safetensors", 1), ("a.yaml", 1))
    tags = {
        "a.safetensors": await models.put(created, "a.safetensors", safetensors()),
        "a.yaml": await models.put(created, "a.yaml", b"model: {}"),
    }
    await models.update(created.checkpoint.id, tags)
    assert (await _rename(models, created.checkpoint.id, "b"))[0] == 202
    assert (await models.show(created.checkpoint.id))["name"] == ["b.safetensors", "a.yaml"]
    await _keys(models, created.checkpoint.id, "a.safetensors", "a.yaml", "b.safetensors")


async def test_a_name_in_use_and_a_foreign_checkpoint_are_refused(models: Running) -> None:
    checkpoint_id = await models.upload("a.safetensors", safetensors())
    await models.create(("b.safetensors", 1), kind="Lora")
    async with refused("FAILED_PRECONDITION", "b.safetensors already exists"):
        await _rename(models, checkpoint_id, "b")
    async with refused("PERMISSION_DENIED", "bob"):
        await _rename(models, checkpoint_id, "c", by=models.bob)
    for name, words in (("a.b", "does not match"), ("1a", "does not match"), ("x" * 21, "too long"), ("", "too short")):
        async with refused("INVALID_ARGUMENT", words):
            await _rename(models, checkpoint_id, name)
    assert await _rename(models, checkpoint_id, "a") == (200, "no need to update")


async def test_a_name_that_is_too_long_with_its_extension_is_refused(models: Running) -> None:
    name = f"a.{'x' * 250}"
    checkpoint_id = await models.upload(name, b"weights: {}")
    async with refused("INVALID_ARGUMENT", "261 bytes, 255 are allowed"):
        await _rename(models, checkpoint_id, "b" * 10)
    assert (await models.show(checkpoint_id))["name"] == [name]


async def test_of_two_who_take_the_same_name_at_once_one_gets_it(models: Running) -> None:
    ids = [await models.upload(f"{n}.safetensors", safetensors()) for n in "ab"]
    results = await asyncio.gather(*(_rename(models, each, "c") for each in ids), return_exceptions=True)
    (failed,) = [result for result in results if isinstance(result, BaseException)]
    assert isinstance(failed, grpc.aio.AioRpcError)
    assert failed.code() == grpc.StatusCode.FAILED_PRECONDITION
    names = [(await models.show(each))["name"] for each in ids]
    assert names == [[f"{name}.safetensors"] for name in ("ac" if results[1] is not failed else "cb")]


@pytest.mark.slow
async def test_renaming_there_and_back_ends_where_it_began(models: Running, service: tuple[Running, Database]) -> None:
    content = safetensors()
    checkpoint_id = await models.upload("a.safetensors", content)
    await _rename(models, checkpoint_id, "b")
    await _keys(models, checkpoint_id, "a.safetensors", "b.safetensors")
    for name in ("a", "b", "c", "a"):
        assert (await _rename(models, checkpoint_id, name))[0] == 202
    async with asyncio.timeout(120):
        while not (found := await _resolved(models, "a.safetensors")).key.endswith("/a.safetensors"):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    await _let_the_old_ones_go(service)
    await _keys(models, checkpoint_id, "a.safetensors")
    assert await models.blobs.get(found.key) == content


async def test_deleting_while_the_object_moves_leaves_nothing(models: Running) -> None:
    checkpoint_id = await models.upload("a.safetensors", safetensors())
    await _rename(models, checkpoint_id, "b")
    await models.delete([checkpoint_id])
    await _keys(models, checkpoint_id)


class _Twins(Blobs):
    """Two who copy at the same time: none goes on before both have done so."""

    def __init__(self, s3: S3Access) -> None:
        super().__init__(s3.settings())
        self._both = asyncio.Barrier(2)

    async def copy(self, key: str, target: str, *sizes: int) -> None:
        await super().copy(key, target, *sizes)
        await self._both.wait()


async def test_two_who_move_an_object_at_once_leave_it_where_the_row_says(
    lend_database: Callable[[str], str], s3: S3Access
) -> None:
    url, blobs = lend_database("models"), _Twins(s3)
    database, chores = Database(url), Chores(url)
    await chores.prepare()
    store = ModelStore(database, chores, Audit("models", AUDIT_KEY))
    made = Checkpoint(id=uuid4(), type="Lora", status=ACTIVE, owners=["x"], created_at=datetime.now(UTC), params={})
    made.files.append(
        CheckpointFile(checkpoint_id=made.id, position=0, name="a", key="twins/a", upload_id="", parts_number=1)
    )
    await store.add_checkpoint(made)
    await blobs.put("twins/a", b"weights")
    await blobs.create_multipart("twins/b")  # of a copy that was cut short
    await store.save_name(made.id, "a", "b", "twins/b")
    background = Background(Models(store, blobs, users=None), store, blobs, 1, 1)  # type: ignore[arg-type]
    await asyncio.gather(*(background.move_objects(str(made.id)) for _ in range(2)))
    (file,) = (await store.get_checkpoint(made.id)).files
    assert (file.key, file.next_key) == ("twins/b", None)
    assert await blobs.get(file.key) == b"weights"
    assert await blobs.find_uploads("twins/") == []
    await database.dispose()


async def test_a_large_object_is_copied_by_parts(models: Running) -> None:
    content = bytes(range(256)) * 4096 * 11
    await models.blobs.put("large", content)
    await models.blobs.copy("large", "copied", max_single_bytes=1, part_bytes=5 * 1024 * 1024)
    assert await models.blobs.get("copied") == content
    assert "-3" in (await models.blobs.head("copied")).etag, "three parts"
    with pytest.raises(BlobNotFound):
        await models.blobs.copy("none", "copied")


async def test_a_copy_of_which_a_part_fails_leaves_no_upload_and_copies_no_more(s3: S3Access) -> None:
    blobs, asked = Blobs(s3.settings()), []
    await blobs.put("large", bytes(16 * 1024 * 1024))

    def fail(PartNumber: int, **names: Any) -> None:  # noqa: N803 - as boto3 has it
        asked.append(PartNumber)
        raise ClientError({"Error": {"Code": "SlowDown", "Message": ""}}, "UploadPartCopy")

    blobs._client.upload_part_copy = fail
    with pytest.raises(Unavailable):
        await blobs.copy("large", "failed", max_single_bytes=1, part_bytes=1024 * 1024)
    assert sorted(asked) == [1, 2, 3, 4]
    assert await blobs.find_uploads("failed") == []


async def test_a_copy_has_parts_that_are_quick_to_copy_but_a_thousand_at_most(s3: S3Access) -> None:
    blobs, spans = Blobs(s3.settings()), []
    await blobs.put("large", bytes(16 * 1024 * 1024))

    def note(CopySourceRange: str, **names: Any) -> Any:  # noqa: N803 - as boto3 has it
        spans.append(CopySourceRange)
        return {"CopyPartResult": {"ETag": "none"}}

    blobs._client.upload_part_copy = note
    with pytest.raises(InvalidArgument):
        await blobs.copy("large", "not copied", max_single_bytes=1, part_bytes=1)
    assert len(spans) == 1000
    assert f"bytes={16778 * 999}-{16 * 1024 * 1024 - 1}" in spans
