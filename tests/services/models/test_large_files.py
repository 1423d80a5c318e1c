"""Files too large to be looked at while their client waits: answered at once, looked at in the background."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

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


async def nothing_left(models: Running, checkpoint_id: str) -> bool:
    """Whether a checkpoint has no objects."""
    return not await models.blobs.find(f"Stable-diffusion/checkpoint/custom/{checkpoint_id}/")


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
