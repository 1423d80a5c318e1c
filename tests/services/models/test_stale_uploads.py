"""Uploads that are never finished: over real parts, with the chore running every second."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import sqlalchemy as sa

from services.common.audit import Audit
from services.common.blobs import BlobNotFound, Blobs
from services.common.database import Database
from services.models.background import Background
from services.models.chores import Chores
from services.models.domain import Models
from services.models.rows import Checkpoint
from services.models.store import ModelStore
from tests.services.models.conftest import UPLOAD_MAX_HOURS, Running
from tests.services.models.files import safetensors
from tests.serving import AUDIT_KEY


async def _make_older(database: Database, checkpoint_id: str, hours: float) -> None:
    async with database.transaction() as session:
        older = sa.text("UPDATE checkpoints SET created_at = created_at - :age WHERE id = CAST(:id AS uuid)")
        await session.execute(older, {"age": timedelta(hours=hours), "id": checkpoint_id})


async def _is_open(models: Running, upload: Any) -> bool:
    try:
        await models.blobs.list_parts(upload["key"], upload["upload_id"])
    except BlobNotFound:
        return False
    return True


async def test_an_upload_without_a_checkpoint_is_ended_and_others_are_left(
    lend_database: Callable[[str], str], blobs: Blobs
) -> None:
    url = lend_database("models")
    database, chores = Database(url), Chores(url)
    await chores.prepare()
    store = ModelStore(database, chores, Audit("models", AUDIT_KEY))
    kept = Checkpoint(id=uuid4(), type="Lora", owners=["x"], created_at=datetime.now(UTC), params={})
    await store.add_checkpoint(kept)
    keys = [f"Lora/checkpoint/custom/{uuid4()}/stray", f"Lora/checkpoint/custom/{kept.id}/a", f"elsewhere/{uuid4()}/a"]
    for key in keys:
        await blobs.create_multipart(key)

    async def open_keys() -> list[str]:
        return [upload.key for upload in await blobs.find_uploads("") if upload.key in keys]

    background = Background(Models(store, blobs, users=None), store, blobs, 1, 1)  # type: ignore[arg-type]
    await background.end_stale_uploads()
    assert sorted(await open_keys()) == sorted(keys), "they are young"
    await Background(Models(store, blobs, users=None), store, blobs, -1, 1).end_stale_uploads()  # type: ignore[arg-type]
    assert sorted(await open_keys()) == sorted(keys[1:])
    await database.dispose()


async def test_an_upload_that_is_not_finished_in_time_is_ended(
    models: Running, service: tuple[Running, Database]
) -> None:
    _, database = service
    stale = await models.create(("a.safetensors", 2))
    await models.put(stale, "a.safetensors", *[bytes(5 * 1024 * 1024)] * 2)
    fresh = await models.create(("b.safetensors", 1))
    active = await models.upload("c.safetensors", safetensors())
    set_back = await models.upload("d.safetensors", safetensors())
    await models.update(set_back, {"d.safetensors": []}, status="Initial")
    await _make_older(database, fresh.checkpoint.id, UPLOAD_MAX_HOURS - 1)
    await _make_older(database, active, UPLOAD_MAX_HOURS + 1)
    await _make_older(database, set_back, UPLOAD_MAX_HOURS + 1)
    await _make_older(database, stale.checkpoint.id, UPLOAD_MAX_HOURS + 1)

    async with asyncio.timeout(120):
        while (item := await models.show(stale.checkpoint.id))["status"] == "Initial":  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert item["status"] == "Disabled"
    assert item["params"]["error"] == f"the upload was not finished within {UPLOAD_MAX_HOURS} h"
    upload: Any = stale.checkpoint.params["multipart_upload"]["a.safetensors"]
    async with asyncio.timeout(120):
        while await _is_open(models, upload):  # noqa: ASYNC110 - the store tells nobody
            await asyncio.sleep(0.02)
    assert (await models.show(fresh.checkpoint.id))["status"] == "Initial"
    assert (await models.show(active))["status"] == "Active"
    assert (await models.show(set_back))["status"] == "Initial", "its files are all there"
    await models.update(set_back, {"d.safetensors": []})
    assert (await models.show(set_back))["status"] == "Active"
    await models.create(("a.safetensors", 1))  # the name is free


async def test_a_refusal_that_loses_the_object_store_leaves_nothing_there(
    models: Running, service: tuple[Running, Database]
) -> None:
    _, database = service
    created = await models.create(("a.safetensors", 1), ("b.safetensors", 1))
    await models.update(
        created.checkpoint.id, {"b.safetensors": await models.put(created, "b.safetensors", safetensors())}
    )
    url = database.engine.url.render_as_string(hide_password=False)
    store = ModelStore(database, Chores(url), Audit("models", AUDIT_KEY))
    await store.save_refusal(UUID(created.checkpoint.id), "bad")  # and no more, as if the process died then
    uploads: Any = created.checkpoint.params["multipart_upload"]
    prefix = f"Stable-diffusion/checkpoint/custom/{created.checkpoint.id}/"
    async with asyncio.timeout(120):
        while await _is_open(models, uploads["a.safetensors"]) or await models.blobs.find(prefix):  # noqa: ASYNC110
            await asyncio.sleep(0.02)  # the store tells nobody
