"""Tasks end even where one cancellation is swallowed, and leave nothing behind."""

import asyncio
import inspect

from services.common.tasks import Background, cancel


async def test_a_task_that_swallows_a_cancellation_is_cancelled_again() -> None:
    async def stubborn() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.Event().wait()

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)  # it has begun
    await cancel([task])
    assert task.cancelled()


async def test_who_is_cancelled_while_it_cancels_waits_for_their_end_and_ends_cancelled() -> None:
    """As a chore of a loop of chores that is cancelled again, because it has not ended."""
    cancellations = 0

    async def stubborn() -> None:
        nonlocal cancellations
        while cancellations < 3:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancellations += 1

    inner = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    outer = asyncio.create_task(cancel([inner]))
    await asyncio.sleep(0)
    await cancel([outer])
    assert (inner.done(), outer.cancelled(), cancellations) == (True, True, 3)


async def test_a_chore_that_is_stopped_before_it_began_is_closed() -> None:
    chore, background = asyncio.sleep(0), Background()
    background.run(chore)
    await background.stop()
    assert inspect.getcoroutinestate(chore) == inspect.CORO_CLOSED
