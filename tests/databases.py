"""Databases with a service's tables, lent to one test after the other.

Making a database and migrating it takes longer than most tests that need one; emptying its tables does not.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import psycopg
from psycopg import sql

from deploy.local.home import Home
from deploy.local.postgres import ADMIN, Postgres
from services.common.database import Database

ROLE = "tests"
_OTHERS = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()
"""
_TABLES = """
SELECT schemaname, tablename FROM pg_tables
WHERE schemaname NOT IN ('pg_catalog', 'information_schema') AND tablename <> 'alembic_version'
"""
_RESTART = "SELECT setval(seqrelid, seqstart, false) FROM pg_sequence"
# Names of what a test may have renamed, dropped or switched off; CONCAT takes a NULL for nothing.
_SCHEMA = """
SELECT concat(
    (SELECT string_agg(relname, ' ' ORDER BY relname) FROM pg_class WHERE oid >= 16384),
    (SELECT string_agg(conname, ' ' ORDER BY conname) FROM pg_constraint WHERE oid >= 16384),
    (SELECT string_agg(concat(tgname, tgenabled), ' ' ORDER BY tgname) FROM pg_trigger WHERE NOT tgisinternal)
)
"""


class Databases:
    """The databases of one server. Those that are lent belong to one test."""

    def __init__(self, postgres: Postgres, home: Home) -> None:
        self._postgres = postgres
        self._home = home
        self._idle: dict[str, list[str]] = defaultdict(list)
        self._lent: list[tuple[str, str, str]] = []  # service, URL, schema

    def make(self) -> str:
        """The URL of a new, empty database, which has no tables either."""
        name, own = f"test_{uuid.uuid4().hex}", self._postgres.url(ROLE)
        create = sql.SQL("CREATE DATABASE {} OWNER {} TEMPLATE template0")
        with self._connected(own) as connection:
            connection.execute(create.format(sql.Identifier(name), sql.Identifier(ROLE)))
        return f"{own.rpartition('/')[0]}/{name}"

    def lend(self, service: str) -> str:
        """The URL of a database with the tables of a service."""
        if self._idle[service]:
            url = self._idle[service].pop()
        else:
            url = self.make()
            with ThreadPoolExecutor(1) as thread:  # the caller's may have a loop of its own
                thread.submit(asyncio.run, _migrate(url, service)).result()
        with self._connected(url) as connection:
            self._lent.append((service, url, _schema(connection)))
        return url

    def take_back(self) -> None:
        """Ends the use of all that are lent: whoever is connected is not any more, and the tables are empty. What is
        not as it was otherwise is not lent again."""
        while self._lent:
            service, url, schema = self._lent.pop()
            with self._connected(url) as connection:
                connection.execute(_OTHERS)
                if _schema(connection) == schema:
                    connection.execute("SET session_replication_role = replica")  # no trigger has a say
                    tables = [sql.Identifier(*table) for table in connection.execute(_TABLES)]
                    # Not TRUNCATE, which makes a new file of each table and index.
                    connection.execute(sql.SQL("; ").join(sql.SQL("DELETE FROM {}").format(table) for table in tables))
                    connection.execute(_RESTART)
                    self._idle[service].append(url)

    def _connected(self, url: str) -> psycopg.Connection:
        return psycopg.connect(
            host="127.0.0.1",
            port=self._postgres.port,
            user=ADMIN,
            password=self._home.database_password(ADMIN),
            dbname=url.rpartition("/")[2],
            autocommit=True,
        )


def _schema(connection: psycopg.Connection) -> str:
    found = connection.execute(_SCHEMA).fetchone()
    assert found is not None
    return str(found[0])


async def _migrate(url: str, service: str) -> None:
    database = Database(url)
    await database.migrate(service)
    await database.dispose()
