"""Tasks end even where one cancellation is swallowed."""

import asyncio

from services.common import cancelling


async def test_a_task_that_swallows_a_cancellation_is_cancelled_again() -> None:
    async def stubborn() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.Event().wait()

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)  # it has begun
    await cancelling.cancel([task])
    assert task.cancelled()
