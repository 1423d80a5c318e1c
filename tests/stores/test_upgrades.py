"""Databases of the first released schema, with rows in them, are brought up to date without losing any.

first_schema/ has rows as the first schema had them. A service whose schema gets a second version gets a file there.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from services.common.audit import Audit
from services.common.database import Database
from services.endpoints.store import EndpointStore
from services.identity.store import IdentityStore
from services.inference.queue.store import LeaseStore
from services.inference.states import State
from services.inference.store import JobStore
from services.inference.submitting.quotas import Quotas
from services.models.chores import Chores
from services.models.store import Filters, ModelStore
from services.training.store import TrainingStore
from tests.processes import ROOT
from tests.serving import AUDIT_KEY

FIRST = "0001"
ROWS = Path(__file__).with_name("first_schema")
SERVICES = sorted(path.parents[1].parent.name for path in ROOT.glob("services/*/migrations/versions/0002_*.py"))
ENDPOINT = "22222222-0000-4000-8000-000000000001"

Upgrade = Callable[[str], Awaitable[Database]]
Rows = dict[str, list[dict[str, Any]]]


async def rows_of(database: Database) -> Rows:
    """All rows of all tables of a database, by table, as JSON."""
    tables = "SELECT tablename FROM pg_tables WHERE schemaname = 'public' AND tablename <> 'alembic_version'"
    async with database.transaction() as session:
        found = {}
        for table in (await session.scalars(text(tables))).all():
            rows = await session.scalars(text(f'SELECT to_jsonb(t) FROM "{table}" t ORDER BY t::text'))
            found[table] = list(rows)
        return found


@pytest.fixture
async def begin(make_database: Callable[[], str]) -> AsyncIterator[Upgrade]:
    """A database of a service's first schema, with rows."""
    made: list[Database] = []

    async def make(service: str) -> Database:
        database = Database(make_database())
        made.append(database)
        await database.migrate(service, FIRST)
        async with database.transaction() as session:
            connection = await session.connection()
            driver: Any = (await connection.get_raw_connection()).driver_connection
            await driver.execute((ROWS / f"{service}.sql").read_text())
        return database

    yield make
    for database in made:
        await database.dispose()


def test_every_service_whose_schema_was_changed_has_rows_of_the_first() -> None:
    assert [path.stem for path in sorted(ROWS.glob("*.sql"))] == SERVICES


async def test_a_schema_that_a_newer_version_has_made_is_left_as_it_is(begin: Upgrade) -> None:
    database = await begin("endpoints")
    await database.migrate("endpoints")
    async with database.transaction() as session:
        await session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    before = await rows_of(database)
    await database.migrate("endpoints")
    assert await rows_of(database) == before
    async with database.transaction() as session:
        assert await session.scalar(text("SELECT version_num FROM alembic_version")) == "9999"


@pytest.mark.parametrize("service", SERVICES)
async def test_an_upgrade_keeps_every_row_and_what_it_says(service: str, begin: Upgrade) -> None:
    database = await begin(service)
    before = await rows_of(database)
    assert all(before.values()), "a table of the first schema has no row here"
    await database.migrate(service)
    after = await rows_of(database)
    for table, rows in before.items():
        assert len(after[table]) == len(rows)
        kept = [{name: row[name] for name in rows[0] if name in row} for row in after[table]]
        assert sorted(map(str, kept)) == sorted(str({name: row[name] for name in kept[0]}) for row in rows)


async def test_keys_and_secrets_of_the_first_schema_still_open_doors(begin: Upgrade) -> None:
    database = await begin("identity")
    await database.migrate("identity")
    store = IdentityStore(database, Audit("identity", AUDIT_KEY))
    use = await store.find_key_use("a" * 64, "ann")
    assert use is not None
    assert (use.owner, use.impersonate, use.roles, use.permissions) == ("api", True, ["Designer"], ["inference:all"])
    secret = await store.find_secret("c" * 64)
    assert secret is not None
    assert (secret.kind, secret.subject) == ("worker", ENDPOINT)


async def test_checkpoints_of_the_first_schema_are_listed_and_counted(begin: Upgrade) -> None:
    database = await begin("models")
    await database.migrate("models")
    store = ModelStore(database, Chores("postgresql+psycopg://nobody@nowhere/nothing"), Audit("models", AUDIT_KEY))
    found, total = await store.page_checkpoints(Filters(), 1, 10)
    assert [checkpoint.names for checkpoint in found] == [["three.ckpt"], ["two.safetensors"], ["one.safetensors"]]
    assert total == 3
    _, active = await store.page_checkpoints(Filters(statuses=["Active"]), 1, 10)
    assert active == 1


async def test_pools_of_the_first_schema_are_as_large_as_they_were_meant_to_be(begin: Upgrade) -> None:
    database = await begin("endpoints")
    await database.migrate("endpoints")
    store = EndpointStore(database, Audit("endpoints", AUDIT_KEY))
    rows = {row.id[-1]: row for row in await store.get_all()}
    assert {number: row.num_workers for number, row in rows.items()} == {"1": 3, "2": 2, "3": 1}
    assert rows["2"].error == "no CUDA here"
    assert [worker.pid for worker in await store.get_workers()] == [4242, None]
    await store.mark_deleting(["esd-async-one"])  # and they go on from there


async def test_jobs_of_the_first_schema_are_in_their_states_and_go_on(begin: Upgrade) -> None:
    database = await begin("inference")
    await database.migrate("inference")
    jobs, leases = JobStore(database, Quotas()), LeaseStore(database)
    states = [State.CREATED, State.QUEUED, State.HELD, State.RUNNING, State.SUCCEED, State.FAILED]
    ids = [UUID(f"44444444-0000-4000-8000-00000000000{number}") for number in range(1, 7)]
    found = [await jobs.get(job_id) for job_id in ids]
    assert [job and job.state for job in found] == states
    (claimed,) = await leases.claim(UUID(ENDPOINT), "w", UUID("66666666-0000-4000-8000-000000000001"), 2, [])
    assert claimed.id == ids[1]
    assert await leases.fail(UUID(ENDPOINT), UUID("55555555-0000-4000-8000-000000000004"), "it broke") is not None


async def test_trainings_of_the_first_schema_are_seen(begin: Upgrade) -> None:
    database = await begin("training")
    await database.migrate("training")
    trainings = await TrainingStore(database).page(None, 10, None)
    assert [(training.owner, training.status) for training in trainings] == [("ann", "Training"), ("bob", "Failed")]
