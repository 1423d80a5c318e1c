"""Statements straight through PostgreSQL's driver: for what runs at every request, poll or job.

A session of SQLAlchemy takes several times as long as the statement that it sends. Here a statement is compiled once,
sent on a connection that is open already, and its rows come back as dictionaries.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import psycopg
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb
from sqlalchemy import Executable
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg

_DIALECT = PGDialect_psycopg()  # type: ignore[no-untyped-call]
_Connection = psycopg.AsyncConnection[dict[str, Any]]


class Run(Protocol):
    """Runs a statement with values for its parameters, and answers its rows.

    It is compiled once if it is the same object each time, so statements are constants of their modules.
    """

    async def __call__(self, statement: Executable, **values: Any) -> list[dict[str, Any]]: ...


class Driver:
    """Connections to one database, kept open; at most `size` of them work at once."""

    def __init__(self, url: str, size: int) -> None:
        self._url = url
        self._turns = asyncio.Semaphore(size)
        self._idle: list[_Connection] = []  # the last one used is the next: its statements are prepared
        self._is_closed = False

    async def run(self, statement: Executable, **values: Any) -> list[dict[str, Any]]:
        """Runs a statement, which is a transaction of its own.

        Raises:
            psycopg.OperationalError: the database does not answer.
        """
        async with self._connection() as connection:
            return await _run(connection, statement, values)

    @asynccontextmanager
    async def atomic(self) -> AsyncIterator[Run]:
        """What runs in the block is one transaction, committed at its end.

        Raises:
            psycopg.OperationalError: the database does not answer.
        """
        async with self._connection() as connection, connection.transaction():

            async def run(statement: Executable, **values: Any) -> list[dict[str, Any]]:
                return await _run(connection, statement, values)

            yield run

    async def close(self) -> None:
        """Closes the connections: those that work when that is done."""
        self._is_closed = True
        while self._idle:
            await self._idle.pop().close()

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[_Connection]:
        async with self._turns:
            while self._idle and has_ended(self._idle[-1]):
                await self._idle.pop().close()
            if self._idle:
                connection = self._idle.pop()
            else:
                connection = await _Connection.connect(self._url, autocommit=True, row_factory=dict_row)
            try:
                yield connection
            except psycopg.errors.ReadOnlySqlTransaction:  # of a server that is no primary: the next one may be
                await connection.close()
                raise
            finally:
                is_sound = connection.pgconn.transaction_status == TransactionStatus.IDLE
                if is_sound and not self._is_closed:
                    self._idle.append(connection)
                else:  # it broke, or its task was cancelled half way
                    await connection.close()


def has_ended(connection: psycopg.AsyncConnection[Any]) -> bool:
    """Whether the connection was closed, by us or while nobody used it by the server.

    An idle connection has nothing to say, so one that can be read has ended. A ping would find the same for a round
    trip, which costs as much as the statement that follows.
    """
    if connection.closed:
        return True
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    return bool(poll.poll(0)) and connection.pgconn.transaction_status == TransactionStatus.IDLE


@dataclass(frozen=True)
class _Compiled:
    text: bytes
    constants: dict[str, Any]
    json_names: frozenset[str]


@lru_cache(maxsize=512)
def _compiled(statement: Executable) -> _Compiled:
    compiled: Any = statement.compile(  # type: ignore[attr-defined]
        dialect=_DIALECT, compile_kwargs={"render_postcompile": True}
    )
    json_names = frozenset(name for name, bind in compiled.binds.items() if isinstance(bind.type, JSONB))
    # The text is SQLAlchemy's, not a user's; the values go beside it.
    return _Compiled(str(compiled).encode(), compiled.params, json_names)


async def _run(connection: _Connection, statement: Executable, values: dict[str, Any]) -> list[dict[str, Any]]:
    compiled = _compiled(statement)
    given = compiled.constants | values
    for name in compiled.json_names:
        if given[name] is not None:
            given[name] = Jsonb(given[name])
    cursor = await connection.execute(compiled.text, given)
    # None where there are no rows to fetch; `description` would tell too, and make an object of each column.
    return await cursor.fetchall() if cursor.rownumber is not None else []
