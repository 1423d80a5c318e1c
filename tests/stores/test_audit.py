"""The audit's table and chain: what is refused, what a tampered table is told by, and how replicas share one chain."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa
import structlog
from sqlalchemy.exc import DBAPIError
from structlog.testing import capture_logs

from services.common import audit
from services.common.audit import Audit, Head, Verdict, differences, logged_heads, verify
from services.common.auth import Caller, Kind, Origin, set_caller, set_origin
from services.common.database import Database
from tests.serving import AUDIT_KEY

AUDIT = Audit("endpoints", AUDIT_KEY)


@pytest.fixture
def database_url(lend_database: Callable[[str], str]) -> str:
    return lend_database("endpoints")


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = Database(database_url)
    yield database
    await database.dispose()


async def record(database: Database, target: str, **after: Any) -> None:
    async with database.transaction() as session:
        await AUDIT.record(session, "thing.create", target, after=after)


async def sql(database: Database, *statements: str) -> list[Any]:
    """The rows of the last statement."""
    async with database.transaction() as session:
        for statement in statements:
            result = await session.execute(sa.text(statement))
        return list(result.all()) if result.returns_rows else []  # type: ignore[attr-defined]


async def tamper(database: Database, *statements: str) -> Verdict:
    """What `verify` says after somebody with all rights in the database did this to five rows."""
    for number in range(1, 6):
        await record(database, f"thing {number}", size=number)
    (last,) = await sql(database, "SELECT sequence, mac FROM audit ORDER BY sequence DESC LIMIT 1")
    await sql(database, "ALTER TABLE audit DISABLE TRIGGER USER", *statements)
    return await verify(database, AUDIT_KEY, [Head(*last)])


async def test_a_row_says_who_changed_what_from_where(database: Database) -> None:
    async def serve_a_request() -> None:
        set_caller(Caller(Kind.USER, "ann", key_owner="api"))
        set_origin(Origin("192.0.2.7", "request-1"))
        async with database.transaction() as session:
            await AUDIT.record(session, "thing.update", "x", {"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 4, "d": ["ü"]})

    await asyncio.create_task(serve_a_request())
    await record(database, "y", a=1)
    ann, service = await sql(
        database,
        "SELECT kind, actor, key_owner, address, request_id, action, target, changes FROM audit ORDER BY sequence",
    )
    changes = {"b": {"from": 2, "to": 4}, "c": {"from": 3}, "d": {"to": ["ü"]}}
    assert tuple(ann) == ("user", "ann", "api", "192.0.2.7", "request-1", "thing.update", "x", changes)
    assert tuple(service)[:5] == ("service", "endpoints", "", "", "")
    assert await verify(database, AUDIT_KEY) == Verdict(
        2, Head(2, (await sql(database, "SELECT max(mac) FROM audit WHERE sequence = 2"))[0][0])
    )


async def test_what_changes_nothing_and_what_is_undone_leave_no_row(database: Database) -> None:
    await record(database, "x")
    with suppress(ZeroDivisionError):
        async with database.transaction() as session:
            await AUDIT.record(session, "thing.create", "x", after={"a": 1})
            raise ZeroDivisionError
    assert (await verify(database, AUDIT_KEY)).num_rows == 0
    assert differences({"a": None}, {"b": None}) == {}


async def test_the_database_refuses_to_change_a_row(database: Database) -> None:
    await record(database, "x", a=1)
    for statement in ("UPDATE audit SET actor = 'bob'", "DELETE FROM audit WHERE sequence = 1", "TRUNCATE audit"):
        with pytest.raises(DBAPIError, match="the audit is append-only"):
            await sql(database, statement)
    assert (await verify(database, AUDIT_KEY)).num_rows == 1


async def test_an_untouched_chain_is_whole(database: Database) -> None:
    assert (await tamper(database)).problems == []


async def test_each_altered_row_is_named(database: Database) -> None:
    changes = ["actor = 'bob'", "at = at + interval '1 us'", "changes = '{}'", "mac = md5(mac)"]
    altered = (f"UPDATE audit SET {change} WHERE sequence = {number}" for number, change in enumerate(changes, 1))
    verdict = await tamper(database, *altered)
    named = [f"row {number} was altered, or is not where it was written" for number in range(1, 6)]
    assert verdict.problems == named, "the fifth is chained to a mac that is no more"


async def test_a_row_taken_out_is_named(database: Database) -> None:
    assert (await tamper(database, "DELETE FROM audit WHERE sequence IN (2, 3)")).problems == [
        "rows 2 to 3 are missing"
    ]


async def test_a_row_taken_out_and_the_gap_closed_is_noticed(database: Database) -> None:
    close = "UPDATE audit SET sequence = sequence - 1 WHERE sequence > 2"
    verdict = await tamper(database, "DELETE FROM audit WHERE sequence = 2", close)
    assert "row 2 was altered, or is not where it was written" in verdict.problems
    assert "row 5 is missing: the log has it as head" in verdict.problems


async def test_rows_that_changed_places_are_named(database: Database) -> None:
    swap = "UPDATE audit SET sequence = CASE sequence WHEN -2 THEN 3 ELSE 2 END WHERE sequence IN (-2, 3)"
    aside = "UPDATE audit SET sequence = -2 WHERE sequence = 2"
    drop = "ALTER TABLE audit DROP CONSTRAINT audit_pkey"
    verdict = await tamper(database, drop, aside, swap)
    for number in (2, 3):
        assert f"row {number} was altered, or is not where it was written" in verdict.problems


async def test_rows_cut_off_before_the_logged_head_are_noticed(database: Database) -> None:
    verdict = await tamper(database, "DELETE FROM audit WHERE sequence > 3")
    assert verdict.problems == ["rows 4 to 5 are missing: the log has it as head"]
    assert (await verify(database, AUDIT_KEY)).problems == [], "without the log nobody can see it"
    await record(database, "another", a=1)
    await record(database, "another", a=2)
    (head,) = await sql(database, "SELECT mac FROM audit WHERE sequence = 5")
    logged = Head(5, "0" * len(head[0]))
    assert (await verify(database, AUDIT_KEY, [logged])).problems == ["row 5 is not the one that the log has as head"]


async def test_a_row_written_with_another_key_is_noticed(database: Database) -> None:
    async with database.transaction() as session:
        await Audit("endpoints", "x" * 32).record(session, "thing.create", "x", after={"a": 1})
    assert (await verify(database, AUDIT_KEY)).problems == ["row 1 was altered, or is not where it was written"]


async def test_replicas_that_write_at_once_make_one_chain(database: Database, database_url: str) -> None:
    other = Database(database_url)
    try:
        await asyncio.gather(*(record(one, f"thing {n}", n=n) for n in range(15) for one in (database, other)))
    finally:
        await other.dispose()
    verdict = await verify(database, AUDIT_KEY)
    assert (verdict.num_rows, verdict.head.sequence, verdict.problems) == (30, 30, [])


async def test_the_head_is_logged_at_the_start_and_at_the_end(database: Database) -> None:
    await record(database, "x", a=1)
    with capture_logs() as logs:
        logging = asyncio.create_task(AUDIT.log_heads(database))
        while not logs and not logging.done():  # noqa: ASYNC110 - a log line wakes nobody
            await asyncio.sleep(0.01)
        await record(database, "y", a=1)
        logging.cancel()
        await asyncio.wait([logging])
    assert [entry["sequence"] for entry in logs] == [1, 2]
    assert {len(entry["mac"]) for entry in logs} == {64}


async def test_the_head_is_logged_again_whenever_it_has_changed(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "_HEAD_SECONDS", 0.02)  # of a minute
    with capture_logs() as logs:
        logging = asyncio.create_task(AUDIT.log_heads(database))
        for number in range(1, 4):
            await record(database, "x", a=number)
            while [entry["sequence"] for entry in logs][-1:] != [number]:  # noqa: ASYNC110 - a log line wakes nobody
                await asyncio.sleep(0.01)
        logging.cancel()
        await asyncio.wait([logging])


@pytest.mark.parametrize("as_json", [True, False])
def test_heads_are_found_in_logs_of_both_formats(as_json: bool) -> None:
    console = structlog.dev.ConsoleRenderer(colors=True)
    heads = {Head(), Head(12, "ab" * 32)}
    text = "models     | something else\n"
    for head in heads:
        entry = {"service": "models", **head._asdict(), "event": "audit head", "level": "info"}
        line = json.dumps(entry) if as_json else console(None, "info", dict(entry))
        text += f"models     | {line}\n"
    assert logged_heads(text) == {"models": heads}
