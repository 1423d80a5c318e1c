"""Chores at their beginning and end; what they do is tested where it is done."""

import asyncio

from services.common import cancelling
from services.models.chores import Chores


async def test_chores_that_are_cancelled_at_any_moment_of_their_start_leave_nothing_running(database_url: str) -> None:
    await Chores(database_url).prepare()
    before = asyncio.all_tasks()
    for num_turns in range(0, 60, 3):
        running = asyncio.create_task(Chores(database_url).run())
        for _ in range(num_turns):
            await asyncio.sleep(0)  # the moments of the event loop, of which nothing tells
        await cancelling.cancel([running])
        assert asyncio.all_tasks() == before, f"cancelled after {num_turns} turns"
