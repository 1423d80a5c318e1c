"""Importing checkpoints by URL, over real parts and a web server of the test's own."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import unquote
from uuid import UUID

import pytest
import sqlalchemy as sa

from esd.models.v1 import models_pb2 as pb
from services.common.database import Database
from services.common.errors import Unavailable
from services.common.outbound import Answer, UrlRefused, parse_url
from services.models import imports
from services.models.import_store import ImportStore
from services.models.sources import SUFFIXES, name_in, name_of, validator_of
from tests.gpu_worker.tables import slow
from tests.services.models.conftest import MAX_IMPORT_BYTES, Running, refused
from tests.services.models.files import MIB, malicious, safetensors, torch_zip
from tests.services.models.source import Source, serving_files
from tests.serving import Metadata


@pytest.fixture
async def source() -> AsyncIterator[Source]:
    async with serving_files() as serving:
        yield serving


async def _import(
    models: Running, *urls: str, by: Metadata | None = None, sha256: dict[str, str] | None = None, kind: str = "Lora"
) -> None:
    request = pb.CreateCheckpointRequest(
        checkpoint_type=kind, urls=urls, params={"message": "m", "creator": "x"}, sha256=sha256
    )
    call = models.stub.CreateCheckpoint(request, metadata=by or models.ann)
    assert await call == pb.CreateCheckpointResponse()
    metadata = dict(await call.initial_metadata())
    assert metadata["x-esd-status"] == "202"
    assert unquote(metadata["x-esd-message"]) == "Checkpoint creation in progress, please check later"


async def _items(models: Running) -> list[dict[str, Any]]:
    from google.protobuf.json_format import MessageToDict

    return MessageToDict(await models.list(per_page="100")).get("checkpoints", [])


async def _until(models: Running, test: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The only checkpoint, once the test holds."""
    async with asyncio.timeout(120):
        while True:
            items = await _items(models)
            if items and test(items[0]):
                assert len(items) == 1
                return items[0]
            await asyncio.sleep(0.03)


async def _num_chores(database: Database) -> int:
    """How many imports are to be done or under way."""
    chores = "SELECT count(*) FROM chores.procrastinate_jobs WHERE task_name = 'import'"
    async with database.transaction() as session:
        return int((await session.execute(sa.text(chores))).scalar_one())


async def _ended(models: Running, status: str) -> dict[str, Any]:
    item = await _until(models, lambda item: item["status"] != "Initial")
    assert item["status"] == status, item["params"]
    return item


async def _no_objects(models: Running, item: dict[str, Any]) -> None:
    prefix = f"{item['type']}/checkpoint/custom/{item['id']}/"
    async with asyncio.timeout(120):
        while await models.blobs.find(prefix):  # noqa: ASYNC110 - the store tells nobody
            await asyncio.sleep(0.02)


async def test_a_file_is_imported_and_becomes_active(models: Running, source: Source) -> None:
    content = safetensors(11 * MIB)
    url = source.put("/a.safetensors", content)
    await _import(models, url + "?token=secret", url + "?token=secret")
    item = await _ended(models, "Active")
    assert item["name"] == ["a.safetensors"]
    assert item["allowed_roles_or_users"] == ["designer"]
    params = item["params"]
    assert (params["creator"], params["message"]) == ("ann", "m")
    done = str(len(content))
    assert params["import"] == {"url": url, "bytes_done": done, "bytes_total": done}
    assert params["sha256"] == {"a.safetensors": hashlib.sha256(content).hexdigest()}
    assert params["architecture"] == {"a.safetensors": "sd_1_5"}
    upload = params["multipart_upload"]["a.safetensors"]
    assert set(upload) == {"uploadId", "key", "bucket"}
    assert upload["key"] == f"Lora/checkpoint/custom/{item['id']}/a.safetensors"
    assert await models.blobs.get(upload["key"]) == content
    assert "secret" not in str(item)


async def test_an_imported_file_can_be_taken_out_of_use_and_back(models: Running, source: Source) -> None:
    await _import(models, source.put("/a.safetensors", safetensors()))
    item = await _ended(models, "Active")
    for status in ("Disabled", "Initial", "Active"):
        await models.update(item["id"], {"a.safetensors": []}, status)
        assert (await models.show(item["id"]))["status"] == status


async def test_the_row_is_there_at_once_and_shows_how_far_it_is(models: Running, source: Source) -> None:
    source.gate.clear()
    url = source.put("/a.safetensors", safetensors(11 * MIB))
    source.stop_after["/a.safetensors"] = [6 * MIB]
    await _import(models, url)
    (item,) = await _items(models)
    assert (item["status"], item["name"]) == ("Initial", ["a.safetensors"])
    async with refused("FAILED_PRECONDITION", "a.safetensors already exists"):
        await models.create(("a.safetensors", 1))
    async with refused("FAILED_PRECONDITION", "is being imported"):
        await models.update(item["id"], {"a.safetensors": [{"ETag": "x", "PartNumber": 1}]})
    total = str(len(source.files["/a.safetensors"]))
    item = await _until(models, lambda item: item["params"]["import"]["bytes_total"] == total)
    assert item["status"] == "Initial"
    source.gate.set()
    await _ended(models, "Active")


@pytest.mark.slow
async def test_a_lost_connection_goes_on_behind_the_last_part(models: Running, source: Source) -> None:
    content = safetensors(23 * MIB)
    url = source.put("/a.safetensors", content)
    source.stop_after["/a.safetensors"] = [16 * MIB]
    await _import(models, url, sha256={url: hashlib.sha256(content).hexdigest().upper()})
    item = await _ended(models, "Active")
    assert source.asked == [("/a.safetensors", ""), ("/a.safetensors", str(10 * MIB))]
    assert await models.blobs.get(item["params"]["multipart_upload"]["a.safetensors"]["key"]) == content
    assert item["params"]["sha256"] == {"a.safetensors": hashlib.sha256(content).hexdigest()}


@pytest.mark.slow
@pytest.mark.parametrize("validator", ['ETag: "two"', *slow(["X: y", 'ETag: W/"weak"'])])
async def test_a_source_that_may_have_changed_is_fetched_from_the_beginning(
    models: Running, source: Source, validator: str
) -> None:
    source.validator = validator if "two" not in validator else source.validator
    url = source.put("/a.safetensors", safetensors(23 * MIB, name="old"))
    source.stop_after["/a.safetensors"] = [16 * MIB]
    source.gate.clear()
    await _import(models, url)
    done = str(10 * MIB)
    await _until(models, lambda item: item["params"]["import"]["bytes_done"] == done)
    content = source.files["/a.safetensors"] = safetensors(12 * MIB)
    source.validator = validator
    source.gate.set()
    item = await _ended(models, "Active")
    assert await models.blobs.get(item["params"]["multipart_upload"]["a.safetensors"]["key"]) == content


async def test_a_body_without_a_length_is_taken(models: Running, source: Source) -> None:
    source.chunked = True
    content = safetensors(10 * MIB)
    await _import(models, source.put("/a.safetensors", content))
    item = await _ended(models, "Active")
    assert item["params"]["size"] == {"a.safetensors": str(len(content))}


@pytest.mark.slow
async def test_a_body_that_ends_before_the_length_that_was_announced_first_goes_on(
    models: Running, source: Source
) -> None:
    content = safetensors(23 * MIB)
    source.gate.clear()
    url = source.put("/a.safetensors", content)
    source.stop_after["/a.safetensors"] = [11 * MIB, MIB]
    await _import(models, url)
    await _until(models, lambda item: item["params"]["import"]["bytes_done"] == str(5 * MIB))
    source.chunked = True  # so the next answer ends wherever its connection does
    source.gate.set()
    item = await _ended(models, "Active")
    assert len(source.asked) == 3
    assert item["params"]["size"] == {"a.safetensors": str(len(content))}


async def test_names_come_from_the_sender_or_a_url_on_the_way(models: Running, source: Source) -> None:
    source.put("/files/x", safetensors())
    source.heads["/files/x"] = 'Content-Disposition: attachment; filename="my model.safetensors"\r\n'
    source.redirects["/api/download/models/7"] = "/files/x"
    await _import(models, source.url("/api/download/models/7"))
    item = await _ended(models, "Active")
    assert item["name"] == ["my model.safetensors"]


async def test_a_name_that_only_the_source_knows_is_reserved_at_once(models: Running, source: Source) -> None:
    source.put("/files/one.safetensors", safetensors(MIB))
    source.stop_after["/files/one.safetensors"] = [0, 0]
    source.gate.clear()
    source.redirects["/api/download/models/7"] = "/files/one.safetensors"
    await _import(models, source.url("/api/download/models/7"))
    assert [item["name"] for item in await _items(models)] == [["one.safetensors"]]
    async with refused("FAILED_PRECONDITION", "one.safetensors already exists"):
        await _import(models, source.url("/api/download/models/7"))


async def test_an_import_whose_name_is_found_too_late_is_told_so(models: Running, source: Source) -> None:
    await models.create(("taken.safetensors", 1))
    source.put("/x", safetensors())
    source.heads["/x"] = "Content-Disposition: attachment; filename=taken.safetensors\r\n"
    source.statuses["/x"] = [503]  # when it is asked for the name
    await _import(models, source.url("/x"))
    async with asyncio.timeout(120):
        while not (failed := [item for item in await _items(models) if item["status"] == "Disabled"]):  # noqa: ASYNC110
            await asyncio.sleep(0.03)
    assert "taken.safetensors already exists" in failed[0]["params"]["error"]


@pytest.mark.parametrize(
    ("path", "content", "words"),
    [
        ("/missing.safetensors", None, "answers 404"),
        ("/x", b"abc", "gives no file whose name ends in"),
        ("/empty.safetensors", b"", "the file is empty"),
        ("/bad.safetensors", b"no header", "bad.safetensors"),
        ("/evil.ckpt", torch_zip(malicious("true")), "evil.ckpt"),
        ("/large.safetensors", bytes(MAX_IMPORT_BYTES + 1), "bytes are too many"),
    ],
)
async def test_what_cannot_be_imported_is_disabled_with_the_reason(
    models: Running, source: Source, path: str, content: bytes | None, words: str
) -> None:
    if content is not None:
        source.put(path, content)
    await _import(models, source.url(path))
    item = await _ended(models, "Disabled")
    assert words in item["params"]["error"]
    await _no_objects(models, item)
    if path != "/x":
        await models.create((path[1:], 1))  # the name is free


@pytest.mark.slow
async def test_too_many_bytes_without_a_length_end_the_import(models: Running, source: Source) -> None:
    source.chunked = True
    await _import(models, source.put("/a.safetensors", bytes(MAX_IMPORT_BYTES + MIB)))
    item = await _ended(models, "Disabled")
    assert "more than the" in item["params"]["error"]
    await _no_objects(models, item)


async def test_a_wrong_hash_ends_the_import(models: Running, source: Source) -> None:
    url = source.put("/a.safetensors", safetensors())
    await _import(models, url, sha256={url: "0" * 64})
    item = await _ended(models, "Disabled")
    assert "the SHA-256 is" in item["params"]["error"]
    await _no_objects(models, item)


@pytest.mark.slow
async def test_errors_that_may_pass_are_tried_again(models: Running, source: Source) -> None:
    url = source.put("/a.safetensors", safetensors())
    source.statuses["/a.safetensors"] = [503, 429]
    await _import(models, url)
    await _ended(models, "Active")
    assert len(source.asked) == 3


async def test_an_import_ends_when_its_time_is_over(
    models: Running, source: Source, service: tuple[Running, Database]
) -> None:
    url = source.put("/a.safetensors", safetensors())
    source.statuses["/a.safetensors"] = [503] * 5
    await _import(models, url)
    async with service[1].transaction() as session:
        await session.execute(sa.text("UPDATE imports SET began_at = now() - interval '25 hours'"))
    item = await _ended(models, "Disabled")
    assert "the import took longer than 24 h" in item["params"]["error"]


@pytest.mark.slow
async def test_the_time_that_an_import_has_waited_is_not_its_own(
    models: Running, source: Source, service: tuple[Running, Database]
) -> None:
    url = source.put("/a.safetensors", safetensors())
    source.statuses["/a.safetensors"] = [503] * 3
    await _import(models, url)
    async with service[1].transaction() as session:
        await session.execute(sa.text("UPDATE checkpoints SET created_at = created_at - interval '25 hours'"))
    await _ended(models, "Active")


async def test_an_import_that_no_attempt_has_ended_in_its_time_is_ended(
    models: Running, source: Source, service: tuple[Running, Database]
) -> None:
    url = source.put("/a.safetensors", safetensors())
    source.statuses["/a.safetensors"] = [503] * 100
    await _import(models, url)
    await _until(models, lambda _: bool(source.asked))
    async with service[1].transaction() as session:
        await session.execute(sa.text("SET LOCAL search_path TO public, chores"))
        await session.execute(sa.text("DELETE FROM chores.procrastinate_jobs WHERE task_name = 'import'"))
        await session.execute(sa.text("UPDATE imports SET began_at = now() - interval '26 hours'"))
    item = await _ended(models, "Disabled")
    assert item["params"]["error"] == "the import took longer than 24 h"
    await models.create(("a.safetensors", 1))  # the name is free


@pytest.mark.slow
async def test_only_what_the_source_is_to_blame_for_counts(
    models: Running, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, num_refused = models.blobs.create_multipart, 0

    async def refuse(key: str) -> str:
        nonlocal num_refused
        num_refused += 1
        if num_refused < 3:
            raise Unavailable("the store is away")
        return await create(key)

    monkeypatch.setattr(imports, "_MAX_FAILURES", 2)
    monkeypatch.setattr(models.blobs, "create_multipart", refuse)
    source.statuses["/a.safetensors"] = [503]
    await _import(models, source.put("/a.safetensors", safetensors()))
    assert (await _ended(models, "Active"))["name"] == ["a.safetensors"]
    source.statuses["/b.safetensors"] = [503, 503]
    await _import(models, source.put("/b.safetensors", safetensors()))
    async with asyncio.timeout(120):
        while not (ended := [item for item in await _items(models) if item["status"] == "Disabled"]):  # noqa: ASYNC110
            await asyncio.sleep(0.03)
    assert "answers 503" in ended[0]["params"]["error"]


async def test_an_attempt_that_another_has_followed_ends_nothing_but_itself(
    models: Running, source: Source, service: tuple[Running, Database]
) -> None:
    _, database = service
    source.chunked = True
    source.gate.clear()
    url = source.put("/a.safetensors", safetensors(MIB))
    source.stop_after["/a.safetensors"] = [2 * MIB]
    await _import(models, url)
    item = await _until(models, lambda item: bool(item["params"]["multipart_upload"]))
    upload = item["params"]["multipart_upload"]["a.safetensors"]
    store = ImportStore(database, None, None)  # type: ignore[arg-type] - for what changes nothing but its own row
    assert await store.begin(UUID(item["id"]))
    await models.blobs.abort_multipart(upload["key"], upload["uploadId"])
    source.gate.set()
    async with asyncio.timeout(120):
        while await _num_chores(database):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert (await _items(models))[0]["status"] == "Initial"
    assert await store.begin(UUID(item["id"])), "it is still to be done"


async def test_a_user_has_so_many_imports_at_once(models: Running, source: Source) -> None:
    urls = [source.put(f"/{number}.safetensors", safetensors()) for number in range(31)]
    for url in urls:
        source.stop_after[url.removeprefix(source.url(""))] = [0] * 99
    source.gate.clear()
    await _import(models, *urls[:20])
    async with refused("RESOURCE_EXHAUSTED", "20 imports of ann have not ended", "more than 30"):
        await _import(models, *urls[20:])
    await _import(models, *urls[21:])
    bobs = source.put("/bob.safetensors", safetensors())
    await _import(models, bobs, by=models.bob)
    await models.delete([item["id"] for item in await _items(models)], by=models.admin)


async def test_a_redirect_to_a_private_address_ends_the_import(models: Running, source: Source) -> None:
    source.redirects["/a.safetensors"] = "http://169.254.169.254/latest/meta-data/a.safetensors"
    await _import(models, source.url("/a.safetensors"))
    assert "169.254.169.254 is not a public address" in (await _ended(models, "Disabled"))["params"]["error"]


async def test_bad_requests_are_refused_at_once(models: Running) -> None:
    good = "https://example.com/a.safetensors"
    for urls, sha256, words in [
        (["ftp://example.com/a"], {}, "only http and https"),
        (["https://u:p@example.com/a"], {}, "password"),
        (["x" * 5000], {}, "too long"),
        ([good], {"https://example.com/b": "0" * 64}, "is none of the urls"),
        ([good], {good: "xyz"}, "does not match"),
        ([f"{good}?{n}" for n in range(21)], {}, "at most 20"),
        ([""], {}, "too short"),
    ]:
        async with refused("INVALID_ARGUMENT", words):
            await _import(models, *urls, sha256=sha256)
    async with refused("INVALID_ARGUMENT", "urls: two of them name a file a.safetensors"):
        await _import(models, good, "https://example.com/b/a.safetensors")
    assert await _items(models) == []


async def test_each_url_is_a_checkpoint_of_its_own(models: Running, source: Source) -> None:
    urls = [source.put(f"/{name}.safetensors", safetensors()) for name in "abc"]
    await _import(models, *urls)
    assert len(await _items(models)) == 3
    async with asyncio.timeout(120):
        while {item["status"] for item in await _items(models)} != {"Active"}:  # noqa: ASYNC110
            await asyncio.sleep(0.03)


@pytest.mark.slow
async def test_deleting_during_an_import_leaves_nothing(models: Running, source: Source) -> None:
    source.gate.clear()
    url = source.put("/a.safetensors", safetensors(23 * MIB))
    source.stop_after["/a.safetensors"] = [16 * MIB]
    await _import(models, url)
    done = str(10 * MIB)
    item = await _until(models, lambda item: item["params"]["import"]["bytes_done"] == done)
    await models.delete([item["id"]])
    source.gate.set()
    await _import(models, url)  # the name is free, and the next one works
    again = await _ended(models, "Active")
    assert again["id"] != item["id"]
    await _no_objects(models, item)
    assert await models.blobs.find_uploads(f"Lora/checkpoint/custom/{item['id']}/") == []


@pytest.mark.parametrize(
    ("headers", "urls", "name"),
    [
        ({}, ["https://x/a/b.safetensors?c=d.pt"], "b.safetensors"),
        ({"content-disposition": 'attachment; filename="c.ckpt"'}, ["https://x/b.safetensors"], "c.ckpt"),
        ({"content-disposition": "attachment; filename*=UTF-8''%C3%BC.pt; filename=\"x.pt\""}, ["https://x/"], "ü.pt"),
        ({"content-disposition": 'attachment; filename="../../etc/x.pt"'}, ["https://x/"], "x.pt"),
        ({"content-disposition": 'attachment; filename="..\\\\x.pt"'}, ["https://x/"], "x.pt"),
        ({"content-disposition": 'inline; filename="x.exe"'}, ["https://x/a.vae.pt"], "a.vae.pt"),
        ({"content-disposition": "a" * 5000}, ["https://x/first.pt", "https://y/no"], "first.pt"),
        ({"content-disposition": f"{'a;' * 5000} filename=late.pt"}, ["https://x/first.pt"], "first.pt"),
        ({}, ["https://x/first.pt", "https://y/last.BIN"], "last.BIN"),
        ({}, ["https://x/a%2Fb%20c.yaml"], "b c.yaml"),
        ({}, ["https://x/a%00.pt"], None),
        ({}, [f"https://x/{'a' * 300}.pt"], None),
        ({}, ["https://x/.pt"], None),
        ({"content-disposition": "attachment; filename*=UTF-8''a%E2%80%AEtp.pt"}, ["https://x/b.pt"], "b.pt"),
        ({}, ["https://x/"], None),
    ],
)
def test_the_name_of_what_came(headers: dict[str, str], urls: list[str], name: str | None) -> None:
    answer = Answer(200, headers, [parse_url(url) for url in urls], None)  # type: ignore[arg-type]
    if name is None:
        with pytest.raises(UrlRefused, match="gives no file"):
            name_of(answer)
    else:
        assert name_of(answer) == name
        assert name.lower().endswith(SUFFIXES)


def test_hugging_face_urls_tell_the_name_at_once() -> None:
    url = parse_url("https://huggingface.co/org/model/resolve/main/v1-5.safetensors?download=true")
    assert name_in(url) == "v1-5.safetensors"
    assert not name_in(parse_url("https://civitai.com/api/download/models/130072"))


@pytest.mark.parametrize(
    ("headers", "validator"),
    [
        ({"etag": '"a"', "last-modified": "then"}, '"a"'),
        ({"etag": 'W/"a"', "last-modified": "then"}, "then"),
        ({"etag": 'W/"a"'}, ""),
        ({"etag": '"\xe9"', "last-modified": "then"}, "then"),  # a header of ours could not say it
        ({"last-modified": "\xe9"}, ""),
    ],
)
def test_only_what_proves_that_a_file_is_the_same_and_can_be_said_again_is_a_validator(
    headers: dict[str, str], validator: str
) -> None:
    assert validator_of(Answer(200, headers, [], None)) == validator  # type: ignore[arg-type]
