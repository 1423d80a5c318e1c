"""PostgreSQL: sessions, statements, migrations and notifications. One database per service."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import structlog
from alembic import command
from alembic.config import Config
from psycopg.abc import RV, PQGen
from sqlalchemy import Executable, bindparam, event, func, select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, DisconnectionError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from services.common.driver import Driver, Run, has_ended
from services.common.errors import Unavailable
from services.common.process import refuse

log = structlog.get_logger()

_SERVICES = Path(__file__).resolve().parent.parent
# Any number will do, as long as all replicas of a service take the same.
_MIGRATION_LOCK = 0x657364
# A failover may leave us at a server that only reads; the primary is elsewhere, or will be.
_AWAY = (psycopg.OperationalError, psycopg.errors.ReadOnlySqlTransaction)
# The kernel gives up a server that is gone without a word, as where its machine died or a firewall forgot us: within a
# minute, for by its own measure that takes a quarter of an hour, or two hours where we only listen.
_ALIVE = {"keepalives_idle": "30", "keepalives_interval": "10", "keepalives_count": "3", "tcp_user_timeout": "60000"}
_NOTIFY = select(func.pg_notify(bindparam("channel"), bindparam("payload")))


class Database:
    """An engine and its sessions. `url` is `postgresql+psycopg://…`.

    Raises:
        SystemExit: it is another kind of URL, or none.
    """

    def __init__(self, url: str, pool_size: int = 8) -> None:
        try:
            has_driver = make_url(url).drivername == "postgresql+psycopg"
        except ArgumentError:
            has_driver = False
        if not has_driver:  # its password is not to be seen
            refuse("setting ESD_DATABASE_URL: it must be postgresql+psycopg://USER:PASSWORD@HOST:PORT/DATABASE")
        address = make_url(url)
        address = address.set(query={**_ALIVE, **address.query})
        self._url = address.render_as_string(hide_password=False)
        # Errors go to the log, and the values of a statement may be secrets.
        self.engine = create_async_engine(address, pool_size=pool_size, max_overflow=0, hide_parameters=True)
        event.listen(self.engine.sync_engine, "checkout", _refuse_if_ended)
        event.listen(self.engine.sync_engine, "checkin", self._close_if_disposed)
        event.listen(self.engine.sync_engine, "handle_error", _leave_if_read_only)
        self._is_disposed = False
        self._sessions = async_sessionmaker(self.engine, expire_on_commit=False)
        self._plain_url = address.set(drivername="postgresql").render_as_string(hide_password=False)
        self._driver = Driver(self._plain_url, pool_size)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncSession]:
        """A session whose block is one transaction, committed at its end.

        Raises:
            Unavailable: the database does not answer.
        """
        with _told_as_unavailable():
            async with self._sessions() as session, session.begin():
                yield session

    async def run(self, statement: Executable, **values: Any) -> list[dict[str, Any]]:
        """Runs one statement, which is a transaction of its own, straight through the driver; answers its rows.

        For what runs often: no session, and no BEGIN and COMMIT, which take several times as long as the statement.

        Raises:
            Unavailable: the database does not answer.
        """
        with _told_as_unavailable():
            return await self._driver.run(statement, **values)

    @asynccontextmanager
    async def atomic(self) -> AsyncIterator[Run]:
        """Yields what runs statements like `run`, all of the block in one transaction.

        Raises:
            Unavailable: the database does not answer.
        """
        with _told_as_unavailable():
            async with self._driver.atomic() as run:
                yield run

    async def migrate(self, service: str, revision: str = "head") -> None:
        """Brings the schema up to date, or to a revision; replicas that start at once wait for each other.

        Waits for the database as long as it takes, because it may be starting too. A schema that only a newer version
        of the service knows is left as it is.
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
                async with await Listener.connect(self._plain_url, autocommit=True) as connection:
                    for channel in channels:
                        await connection.execute(psycopg.sql.SQL("LISTEN {}").format(psycopg.sql.Identifier(channel)))
                    for channel in channels:
                        await on_notify(channel, "")
                    async for notification in connection.notifies():
                        await on_notify(notification.channel, notification.payload)
            except _AWAY as error:
                log.warning("listening again", channels=channels, error=str(error).strip())
                await asyncio.sleep(0.3)  # nothing tells when a database that is down comes back

    async def dispose(self) -> None:
        """Closes all connections: those that work when that is done."""
        self._is_disposed = True
        await self.engine.dispose()
        await self._driver.close()

    def _close_if_disposed(self, _connection: object, record: Any) -> None:
        """Closes what comes back late: its pool is gone, and would leave it open."""
        if self._is_disposed:
            record.invalidate()


class Listener(psycopg.AsyncConnection[Any]):
    """A connection that is woken by what comes, and by nothing else: while it waits, psycopg's own looks ten times a
    second whether somebody pressed Ctrl-C, which the event loop tells by itself."""

    async def wait(self, gen: PQGen[RV], interval: float = math.inf, timeout: float | None = None) -> RV:
        return await super().wait(gen, interval, timeout)


def _refuse_if_ended(connection: Any, _record: object, _fairy: object) -> None:
    """Makes the pool replace a connection that has ended."""
    if has_ended(connection.driver_connection):
        raise DisconnectionError("the server has closed the connection")


def _leave_if_read_only(context: Any) -> None:
    """Makes the pool replace its connections, which lead to a server that is no primary."""
    if isinstance(context.original_exception, psycopg.errors.ReadOnlySqlTransaction):
        context.is_disconnect = True


@contextmanager
def _told_as_unavailable() -> Iterator[None]:
    """What only the database's state is to blame for becomes Unavailable."""
    try:
        yield
    except (DBAPIError, psycopg.Error) as error:
        cause = getattr(error, "orig", error)
        if not isinstance(cause, _AWAY):
            raise
        log.warning("database", error=str(cause).strip())  # without the statement
        raise Unavailable("the database does not answer at present") from error
    except PoolTimeoutError as error:
        log.warning("database", error=str(error))
        raise Unavailable("the database is too busy at present") from error


async def notify(transaction: AsyncSession | Run, channel: str, payload: str) -> None:
    """Notifies listeners of all replicas when the transaction commits; payloads end at 8,000 bytes."""
    if isinstance(transaction, AsyncSession):
        await transaction.execute(_NOTIFY, {"channel": channel, "payload": payload})
    else:
        await transaction(_NOTIFY, channel=channel, payload=payload)
