"""PostgreSQL: sessions, migrations and notifications. One database per service."""

from __future__ import annotations

import asyncio
import select
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import structlog
from alembic import command
from alembic.config import Config
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row
from sqlalchemy import Select, event, text
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DisconnectionError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from services.common.errors import Unavailable

log = structlog.get_logger()

_SERVICES = Path(__file__).resolve().parent.parent
# Any number will do, as long as all replicas of a service take the same.
_MIGRATION_LOCK = 0x657364
_DIALECT = PGDialect_psycopg()  # type: ignore[no-untyped-call]


class Database:
    """An engine and its sessions. `url` is `postgresql+psycopg://…`."""

    def __init__(self, url: str, pool_size: int = 8) -> None:
        self._url = url
        # Errors go to the log, and the values of a statement may be secrets.
        self.engine = create_async_engine(url, pool_size=pool_size, max_overflow=0, hide_parameters=True)
        event.listen(self.engine.sync_engine, "checkout", _refuse_if_ended)
        self._sessions = async_sessionmaker(self.engine, expire_on_commit=False)
        self._plain_url = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
        self._reader: psycopg.AsyncConnection[dict[str, Any]] | None = None
        self._reading = asyncio.Lock()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncSession]:
        """A session whose block is one transaction, committed at its end.

        Raises:
            Unavailable: the database does not answer.
        """
        with _told_as_unavailable():
            async with self._sessions() as session, session.begin():
                yield session

    async def fetch(self, query: Select[Any], **values: Any) -> list[dict[str, Any]]:
        """The rows of one statement, straight from the driver: for what clients poll.

        No session and no BEGIN and COMMIT around it, which take several times as long as the statement itself.

        Raises:
            Unavailable: the database does not answer.
        """
        compiled = query.compile(dialect=_DIALECT)
        with _told_as_unavailable():
            reader = await self._connected_reader()
            # The text is SQLAlchemy's, not a user's; the values go beside it.
            cursor = await reader.execute(str(compiled).encode(), {**compiled.params, **values})
            return await cursor.fetchall()

    async def _connected_reader(self) -> psycopg.AsyncConnection[dict[str, Any]]:
        async with self._reading:
            if self._reader is not None and _has_ended(self._reader):
                await self._reader.close()
                self._reader = None
            if self._reader is None:
                self._reader = await psycopg.AsyncConnection.connect(
                    self._plain_url, autocommit=True, row_factory=dict_row
                )
            return self._reader

    async def migrate(self, service: str, revision: str = "head") -> None:
        """Brings the schema up to date, or to a revision; replicas that start at once wait for each other.

        Waits for the database as long as it takes, because it may be starting too.
        """
        while True:
            try:
                return await asyncio.to_thread(self._upgrade, service, revision)
            except OperationalError as error:
                log.warning("waiting for the database", error=str(error.orig).strip())
                await asyncio.sleep(0.3)  # nothing tells when a database that is down comes back

    def _upgrade(self, service: str, revision: str) -> None:
        config = Config()
        config.set_main_option("script_location", str(_SERVICES / "common" / "migrations"))
        config.set_main_option("version_locations", str(_SERVICES / service / "migrations" / "versions"))
        config.set_main_option("path_separator", "os")
        config.attributes["url"] = self._url
        config.attributes["lock"] = _MIGRATION_LOCK
        command.upgrade(config, revision)

    async def listen(self, channels: list[str], on_notify: Callable[[str, str], Awaitable[None]]) -> None:
        """Calls `on_notify(channel, payload)` for every NOTIFY, until cancelled.

        A lost connection loses notifications, so after each (re)connection every channel gets one call with an empty
        payload: "read everything again".
        """
        while True:
            try:
                async with await psycopg.AsyncConnection.connect(self._plain_url, autocommit=True) as connection:
                    for channel in channels:
                        await connection.execute(psycopg.sql.SQL("LISTEN {}").format(psycopg.sql.Identifier(channel)))
                    for channel in channels:
                        await on_notify(channel, "")
                    async for notification in connection.notifies():
                        await on_notify(notification.channel, notification.payload)
            except psycopg.OperationalError as error:
                log.warning("listening again", channels=channels, error=str(error).strip())
                await asyncio.sleep(0.3)  # nothing tells when a database that is down comes back

    async def dispose(self) -> None:
        """Closes all connections."""
        await self.engine.dispose()
        if self._reader is not None:
            await self._reader.close()


def _has_ended(connection: psycopg.AsyncConnection[Any]) -> bool:
    """Whether the connection was closed, by us or while nobody used it by the server.

    An idle connection has nothing to say, so one that can be read has ended. A ping would find the same for a round
    trip, which costs as much as the statement that follows.
    """
    if connection.closed:
        return True
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    return bool(poll.poll(0)) and connection.pgconn.transaction_status == TransactionStatus.IDLE


def _refuse_if_ended(connection: Any, _record: object, _fairy: object) -> None:
    """Makes the pool replace a connection that has ended."""
    if _has_ended(connection.driver_connection):
        raise DisconnectionError("the server has closed the connection")


@contextmanager
def _told_as_unavailable() -> Iterator[None]:
    """What only the database's state is to blame for becomes Unavailable."""
    try:
        yield
    except (OperationalError, psycopg.OperationalError) as error:
        log.warning("database", error=str(getattr(error, "orig", error)).strip())  # without the statement
        raise Unavailable("the database does not answer at present") from error
    except PoolTimeoutError as error:
        log.warning("database", error=str(error))
        raise Unavailable("the database is too busy at present") from error


async def notify(session: AsyncSession, channel: str, payload: str) -> None:
    """Notifies listeners when the session's transaction commits; payloads end at 8,000 bytes."""
    await session.execute(text("SELECT pg_notify(:channel, :payload)"), {"channel": channel, "payload": payload})
