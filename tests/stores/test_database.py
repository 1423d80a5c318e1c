"""What all services expect of their database connections."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator

import psycopg
import pytest
from sqlalchemy import Integer, bindparam, make_url, select, text

from services.common.database import Database
from services.common.errors import Unavailable
from services.common.process import EXIT_WRONG_SETTING


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    opened = Database(database_url)
    yield opened
    await opened.dispose()


async def _disconnect_everybody(database_url: str) -> None:
    plain = database_url.replace("+psycopg", "")
    others = (
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = current_database() AND pid <> %s"
    )
    async with await psycopg.AsyncConnection.connect(plain, autocommit=True) as connection:
        cursor = await connection.execute(others, [connection.info.backend_pid])
        assert {ended for (ended,) in await cursor.fetchall()} == {True}


_NUMBER = select(bindparam("number", type_=Integer).label("number"))
_THING = text("INSERT INTO thing DEFAULT VALUES")


async def test_connections_that_the_server_has_closed_are_replaced_before_their_next_use(
    database: Database, database_url: str
) -> None:
    for _ in range(2):
        assert await database.run(_NUMBER, number=7) == [{"number": 7}]
        async with database.transaction() as session:
            assert await session.scalar(text("SELECT 8")) == 8
        await _disconnect_everybody(database_url)


async def test_a_server_that_only_reads_is_unavailable_until_another_one_is_the_primary(
    database: Database, database_url: str
) -> None:
    name = make_url(database_url).database
    plain = database_url.replace("+psycopg", "")
    async with await psycopg.AsyncConnection.connect(plain, autocommit=True) as operator:
        await operator.execute("CREATE TABLE thing ()")
        await operator.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
        for _ in range(2):
            with pytest.raises(Unavailable):
                await database.run(_THING)
            with pytest.raises(Unavailable):
                async with database.atomic() as run:
                    await run(_THING)
            with pytest.raises(Unavailable):
                async with database.transaction() as session:
                    await session.execute(_THING)
        await operator.execute(f'ALTER DATABASE "{name}" RESET default_transaction_read_only')
    await database.run(_THING)
    async with database.transaction() as session:
        await session.execute(_THING)
        assert await session.scalar(text("SELECT count(*) FROM thing")) == 2


async def test_a_server_that_vanishes_is_given_up_by_the_kernel_as_the_url_says_or_within_a_minute(
    database_url: str,
) -> None:
    for url, seconds in ((database_url, 30), (f"{database_url}?keepalives_idle=7", 7)):
        database = Database(url)
        async with database.transaction() as session:
            connection = await (await session.connection()).get_raw_connection()
            assert connection.driver_connection is not None
            with socket.socket(fileno=os.dup(connection.driver_connection.fileno())) as line:
                assert line.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == seconds
                assert line.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000
        await database.dispose()


async def test_many_read_at_once(database: Database) -> None:
    async def read(number: int) -> int:
        return int((await database.run(_NUMBER, number=number))[0]["number"])

    assert await asyncio.gather(*(read(number) for number in range(50))) == list(range(50))


async def test_connections_that_work_when_the_rest_is_closed_are_closed_when_they_come_back(database: Database) -> None:
    async with database.transaction() as session, database.atomic() as run:
        connection = await (await session.connection()).get_raw_connection()
        plain = connection.driver_connection
        await database.dispose()
        assert await session.scalar(text("SELECT 8")) == 8
        assert await run(_NUMBER, number=7) == [{"number": 7}]
    assert plain is not None
    assert plain.closed


async def test_a_database_that_is_away_is_said_to_be_unavailable() -> None:
    database = Database("postgresql+psycopg://nobody@127.0.0.1:1/nothing")
    with pytest.raises(Unavailable):
        await database.run(_NUMBER, number=1)
    with pytest.raises(Unavailable):
        async with database.transaction() as session:
            await session.scalar(text("SELECT 1"))


@pytest.mark.parametrize("url", ["postgresql://esd:hunter2@db/esd", "db:5432, hunter2", ""])
def test_what_is_no_url_of_a_database_stops_the_process_and_is_not_shown(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        Database(url)
    assert ended.value.code == EXIT_WRONG_SETTING
    said = capsys.readouterr().err
    assert said.startswith("setting ESD_DATABASE_URL: it must be postgresql+psycopg://")
    assert "hunter2" not in said
