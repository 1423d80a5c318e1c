"""Chores at their beginning and end; what they do is tested where it is done."""

import asyncio

import pytest
from structlog.testing import capture_logs

from services.common.database import Database
from services.common.tasks import cancel
from services.models.chores import Chores


async def test_chores_that_are_cancelled_at_any_moment_of_their_start_leave_nothing_running(database_url: str) -> None:
    await Chores(database_url).prepare()
    database = Database(database_url, pool_size=1)
    has_begun = asyncio.Event()

    async def begin() -> None:
        has_begun.set()

    before, num_turns = asyncio.all_tasks(), 0
    while not has_begun.is_set():
        chores = Chores(database_url)
        chores.add("begin", begin)
        async with database.transaction() as session:
            await chores.defer(session, "begin", f"after {num_turns}", {})
        running = asyncio.create_task(chores.run())
        for _ in range(num_turns):
            await asyncio.sleep(0)  # the moments of the event loop, of which nothing tells
        await cancel([running])
        assert asyncio.all_tasks() == before, f"cancelled after {num_turns} turns"
        num_turns += 1 + num_turns // 4
    await database.dispose()


@pytest.mark.parametrize(("is_counted", "expected"), [(True, 3), pytest.param(False, 11, marks=pytest.mark.slow)])
async def test_a_chore_is_tried_until_it_is_done_and_told_how_often_if_it_wants_to_know(
    database_url: str, is_counted: bool, expected: int
) -> None:
    num_attempts, done = 0, asyncio.Event()

    async def fail(name: str, num_tried: int = -1) -> None:
        nonlocal num_attempts
        assert num_tried == (num_attempts if is_counted else -1)
        num_attempts += 1
        if num_attempts == expected:
            done.set()
        else:
            raise OSError("the store is down")

    database, chores = Database(database_url, pool_size=1), Chores(database_url, first_wait_seconds=0)
    await chores.prepare()
    chores.add("fail", fail, is_counted=is_counted)
    async with database.transaction() as session:
        await chores.defer(session, "fail", "lock", {"name": "x"})
    with capture_logs() as logs:
        running = asyncio.create_task(chores.run())
        async with asyncio.timeout(120):
            await done.wait()
        await cancel([running])
    failed = {"event": "a chore failed and is tried again", "log_level": "warning", "chore": "fail"}
    assert [line for line in logs if failed.items() <= line.items()] == logs
    assert len(logs) == expected - 1
    await database.dispose()


async def test_a_replica_leaves_chores_of_kinds_that_it_does_not_know_to_one_that_does(database_url: str) -> None:
    database, old, new = Database(database_url, pool_size=1), Chores(database_url), Chores(database_url)
    await new.prepare()
    done = {"new": asyncio.Event(), "known": asyncio.Event()}

    async def do(kind: str) -> None:
        done[kind].set()

    old.add("known", do)
    for kind in ("new", "known"):  # in this order they are looked at
        new.add(kind, do)
        async with database.transaction() as session:
            await new.defer(session, kind, kind, {"kind": kind})
    async with asyncio.timeout(120):
        for replica, kind in ((old, "known"), (new, "new")):
            running = asyncio.create_task(replica.run())
            await done[kind].wait()
            await cancel([running])
    await database.dispose()
