"""Files too large to be looked at while their client waits: answered at once, looked at in the background."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import sqlalchemy as sa

from services.common.database import Database
from tests.services.models.conftest import LOOK_MAX_BYTES, Running
from tests.services.models.files import safetensors

LARGE = safetensors(LOOK_MAX_BYTES)
SMALL = safetensors(64)


async def until(what: Callable[[], Awaitable[Any]]) -> Any:
    """Asks as a client does, until the answer is something."""
    async with asyncio.timeout(120):
        while not (answer := await what()):  # noqa: ASYNC110 - a REST client has nothing else
            await asyncio.sleep(0.02)
    return answer


async def ended(models: Running, checkpoint_id: str) -> dict[str, Any]:
    """The checkpoint when it is not `Initial` any more."""

    async def shown() -> dict[str, Any] | None:
        item = await models.show(checkpoint_id)
        return None if item["status"] == "Initial" else item

    return await until(shown)


async def attempts(database: Database, chore: str) -> int:
    """How often the chores of this name that are to be done again were tried."""
    tried = "SELECT coalesce(sum(attempts), 0) FROM chores.procrastinate_jobs WHERE task_name = :chore"
    async with database.transaction() as session:
        return int((await session.execute(sa.text(tried), {"chore": chore})).scalar_one())


async def nothing_left(models: Running, checkpoint_id: str) -> bool:
    """Whether a checkpoint has no objects."""
    return not await models.blobs.find(f"Stable-diffusion/checkpoint/custom/{checkpoint_id}/")


@asynccontextmanager
async def refusing(database: Database, change: str) -> AsyncIterator[None]:
    """Within the block the database takes no such change, as if each process that tries it died."""
    async with database.transaction() as session:
        function = "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not now'; END $$"
        await session.execute(sa.text(function))
        await session.execute(sa.text(f"CREATE TRIGGER refuse BEFORE {change} EXECUTE FUNCTION refuse()"))
    try:
        yield
    finally:
        async with database.transaction() as session:
            await session.execute(sa.text("DROP FUNCTION refuse CASCADE"))


async def test_a_large_file_is_active_when_it_was_looked_at(models: Running) -> None:
    created = await models.create(("large.safetensors", 1))
    tags = {"large.safetensors": await models.put(created, "large.safetensors", LARGE)}
    for _ in range(3):  # asking again, before and after the look, is fine
        answer = await models.update(created.checkpoint.id, tags)
        assert (answer.status_code, answer.message) == (200, "OK")
    item = await ended(models, created.checkpoint.id)
    assert item["status"] == "Active"
    assert item["params"]["sha256"] == {"large.safetensors": hashlib.sha256(LARGE).hexdigest()}
    assert item["params"]["size"] == {"large.safetensors": str(len(LARGE))}
    assert item["params"]["architecture"] == {"large.safetensors": "sd_1_5"}
    assert (await models.update(created.checkpoint.id, tags)).checkpoint.status == "Active"


async def test_a_large_file_that_is_no_model_is_disabled_with_the_reason(models: Running) -> None:
    created = await models.create(("broken.safetensors", 1))
    content = LARGE[:-1]
    tags = {"broken.safetensors": await models.put(created, "broken.safetensors", content + b"xx")}
    assert (await models.update(created.checkpoint.id, tags)).status_code == 200
    item = await ended(models, created.checkpoint.id)
    assert item["status"] == "Disabled"
    assert item["params"]["error"] == "broken.safetensors is corrupt: 1 bytes follow its last tensor"
    await until(lambda: nothing_left(models, created.checkpoint.id))


async def test_a_look_that_fails_for_no_known_reason_is_the_last_after_a_while(
    models: Running, service: tuple[Running, Database]
) -> None:
    created = await models.create(("large.safetensors", 1))
    tags = {"large.safetensors": await models.put(created, "large.safetensors", LARGE)}
    checkpoint_id = created.checkpoint.id
    async with refusing(service[1], "UPDATE OF sha256 ON checkpoint_files FOR EACH ROW"):
        await models.update(checkpoint_id, tags)
        with pytest.raises(sa.exc.DBAPIError):
            await models.background.look(checkpoint_id, "large.safetensors", "Active", num_tried=8)
        assert (await models.show(checkpoint_id))["status"] == "Initial"
        await models.background.look(checkpoint_id, "large.safetensors", "Active", num_tried=9)
        item = await models.show(checkpoint_id)
    assert item["status"] == "Disabled"
    assert "large.safetensors cannot be looked at" in item["params"]["error"]


async def test_there_is_nothing_to_look_at_under_a_name_that_is_gone(models: Running) -> None:
    checkpoint_id = await models.upload("a.safetensors", safetensors())
    await models.background.look(checkpoint_id, "old.safetensors", "Active", num_tried=0)
    assert (await models.show(checkpoint_id))["status"] == "Active"


async def test_large_and_small_files_of_one_checkpoint_make_it_active_together(models: Running) -> None:
    created = await models.create(("one.safetensors", 1), ("two.safetensors", 1))
    tags = {"one.safetensors": await models.put(created, "one.safetensors", LARGE)}
    await models.update(created.checkpoint.id, tags)

    async def looked_at() -> bool:
        return "sha256" in (await models.show(created.checkpoint.id))["params"]

    await until(looked_at)
    assert (await models.show(created.checkpoint.id))["status"] == "Initial"
    tags = {"two.safetensors": await models.put(created, "two.safetensors", SMALL)}
    await models.update(created.checkpoint.id, tags)
    assert (await models.show(created.checkpoint.id))["status"] == "Active"


async def test_deleting_before_the_look_leaves_nothing(models: Running) -> None:
    created = await models.create(("gone.safetensors", 1))
    tags = {"gone.safetensors": await models.put(created, "gone.safetensors", LARGE)}
    await models.update(created.checkpoint.id, tags)
    await models.delete([created.checkpoint.id])
    # The next look stands behind that of the deleted one in no queue, but says that looks go on.
    again = await models.create(("gone.safetensors", 1))
    tags = {"gone.safetensors": await models.put(again, "gone.safetensors", LARGE)}
    await models.update(again.checkpoint.id, tags)
    assert (await ended(models, again.checkpoint.id))["status"] == "Active"
    await until(lambda: nothing_left(models, created.checkpoint.id))


async def test_a_look_that_is_cut_short_before_it_sets_the_status_is_done_again(
    models: Running, service: tuple[Running, Database]
) -> None:
    created = await models.create(("large.safetensors", 1))
    tags = {"large.safetensors": await models.put(created, "large.safetensors", LARGE)}
    async with refusing(service[1], "UPDATE ON checkpoints FOR EACH ROW WHEN (NEW.status = 'Active')"):
        await models.update(created.checkpoint.id, tags)
        await until(lambda: attempts(service[1], "look_at_object"))
    assert (await ended(models, created.checkpoint.id))["status"] == "Active"


async def test_an_upload_that_was_finished_is_not_ended_however_long_its_look_takes(
    models: Running, service: tuple[Running, Database]
) -> None:
    _, database = service
    created = await models.create(("large.safetensors", 1))
    tags = {"large.safetensors": await models.put(created, "large.safetensors", LARGE)}
    never_finished = await models.create(("other.safetensors", 1))
    async with refusing(database, "UPDATE ON checkpoint_files FOR EACH ROW WHEN (NEW.complete)"):
        await models.update(created.checkpoint.id, tags)
        async with database.transaction() as session:
            await session.execute(sa.text("UPDATE checkpoints SET created_at = created_at - interval '1 year'"))
        assert (await ended(models, never_finished.checkpoint.id))["status"] == "Disabled"
        assert (await models.show(created.checkpoint.id))["status"] == "Initial"
        await models.update(created.checkpoint.id, tags)  # asking again is fine
    assert (await ended(models, created.checkpoint.id))["status"] == "Active"


async def test_a_large_file_that_the_store_has_lost_is_disabled(
    models: Running, service: tuple[Running, Database]
) -> None:
    created = await models.create(("large.safetensors", 1))
    tags = {"large.safetensors": await models.put(created, "large.safetensors", LARGE)}
    async with refusing(service[1], "UPDATE ON checkpoint_files FOR EACH ROW WHEN (NEW.complete)"):
        await models.update(created.checkpoint.id, tags)
        await models.blobs.delete_prefix(f"Stable-diffusion/checkpoint/custom/{created.checkpoint.id}/")
        item = await ended(models, created.checkpoint.id)
    assert item["params"]["error"] == "large.safetensors is gone from the object store; upload it again"
