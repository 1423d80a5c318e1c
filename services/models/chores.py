"""Owns this service's chores: work that is deferred in the transaction of the row it is for, and survives restarts.

procrastinate keeps them in a schema of their own, `chores`, which Alembic never looks at. A chore that was cut short,
by an end of the process or by an error that may pass, is done again: each must bear that, and tell by its row whether
it is still wanted. A process that died is noticed by its missing heartbeat.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from functools import partial
from typing import Any

import procrastinate
import sqlalchemy as sa
import structlog
from procrastinate.exceptions import ConnectorException
from procrastinate.jobs import DeleteJobCondition, Job
from psycopg_pool import AsyncConnectionPool
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncSession

from services.common.database import Listener
from services.common.tasks import first

log = structlog.get_logger()

SHORT, LONG = "default", "long"  # what is done soon, and what takes hours
_SCHEMA = "chores"
_SCHEMA_LOCK = 0x63686F72
_AT_ONCE = 4
_HEARTBEAT_SECONDS = 3.0
_DEAD_AFTER_SECONDS = 10.0
_MAX_WAIT_SECONDS = 300
_MAX_DOUBLINGS = 10  # the wait is the longest by then
_POLL_SECONDS = 1.0  # for those that wait: nothing tells when their time has come

# Called with the deferred arguments, and with `num_tried` where attempts are counted: how many there were before.
Work = Callable[..., Awaitable[None]]


class Chores:
    """The chores of one service. `url` is `postgresql+psycopg://…`; a few run at once here, and as many of those that
    take hours, so that the rest, for which somebody waits, never stands behind them.

    To procrastinate each kind of chore is a queue of its own, and a replica looks into those of the kinds that it does:
    one that a newer replica has deferred waits for such a replica. A worker that finds a kind that it does not know
    would drop it.
    """

    def __init__(self, url: str, first_wait_seconds: float = 2.0) -> None:
        self._conninfo = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
        pool: Any = partial(AsyncConnectionPool, connection_class=Listener)
        connector = procrastinate.PsycopgConnector(
            pool_factory=pool,
            conninfo=self._conninfo,
            kwargs={"options": f"-c search_path={_SCHEMA}"},
            min_size=1,
            max_size=4,
        )
        self._app = procrastinate.App(connector=connector)
        self._first_wait_seconds = first_wait_seconds
        self._kinds = {SHORT: [SHORT], LONG: [LONG]}  # beside what earlier versions have put into two queues

    def add(self, name: str, work: Work, queue: str = SHORT, is_counted: bool = False) -> None:
        """Says who does the chores of this kind. Each is tried until it is done."""

        async def run(context: procrastinate.JobContext, /, **arguments: Any) -> None:
            if is_counted:
                arguments["num_tried"] = context.job.attempts
            try:
                await work(**arguments)
            except Exception:
                log.warning("a chore failed and is tried again", chore=name, arguments=arguments, exc_info=True)
                raise

        retry = _Again(self._first_wait_seconds)
        self._app.task(name=name, queue=self._known(name, queue), pass_context=True, retry=retry)(run)

    def add_periodic(self, name: str, cron: str, work: Callable[[], Awaitable[None]]) -> None:
        """Has this done at the times of `cron`, by one of the replicas."""

        async def run(timestamp: int) -> None:
            await work()

        self._app.periodic(cron=cron)(self._app.task(name=name, queue=self._known(name), queueing_lock=name)(run))

    async def defer(
        self,
        session: AsyncSession,
        name: str,
        lock: str,
        arguments: Mapping[str, str],
        wait: timedelta | None = None,
        priority: int = 0,
    ) -> None:
        """Has the chore done once the session's transaction commits, or when it has waited after that.

        Chores of one `lock` are done one by one; those that wait let the others go first. The one of the highest
        priority is next.
        """
        raw = await (await session.connection()).get_raw_connection()
        await session.execute(sa.text(f"SET LOCAL search_path TO public, {_SCHEMA}"))
        later: Any = {"schedule_in": {"seconds": int(wait.total_seconds())}} if wait else {}
        task = self._app.configure_task(
            name, lock=lock, connection=raw.driver_connection, priority=-1 if wait else priority, **later
        )
        await task.defer_async(**arguments)

    async def prepare(self) -> None:
        """Makes the schema where it is missing; replicas that start at once wait for each other."""
        connector = self._app.connector
        assert isinstance(connector, procrastinate.PsycopgConnector)
        async with self._app.open_async(), connector.pool.connection() as connection:
            await connection.execute("SELECT pg_advisory_xact_lock(%s)", [_SCHEMA_LOCK])
            found = await connection.execute(f"SELECT to_regclass('{_SCHEMA}.procrastinate_jobs')")
            if (await found.fetchone()) == (None,):
                await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {_SCHEMA}")
                await connection.execute(self._app.schema_manager.get_schema())

    async def run(self) -> None:
        """Does chores until it is cancelled; what is under way then waits for the next one who runs."""
        while True:
            try:
                async with self._app.open_async():
                    await first(self._revive(), self._work(SHORT), self._work(LONG))
            except ConnectorException as error:
                log.warning("chores wait for the database", error=str(error))
                await asyncio.sleep(0.5)  # nothing tells when a database that is down comes back
            finally:
                # Of an opening that was cancelled the pool would stay, and hold up the process at its end.
                await self._app.close_async()

    def _known(self, name: str, queue: str = SHORT) -> str:
        self._kinds[queue].append(name)
        return name

    async def _work(self, queue: str) -> None:
        await self._app.run_worker_async(
            queues=self._kinds[queue],
            concurrency=_AT_ONCE,
            install_signal_handlers=False,
            fetch_job_polling_interval=_POLL_SECONDS,
            shutdown_graceful_timeout=0,
            update_heartbeat_interval=_HEARTBEAT_SECONDS,
            stalled_worker_timeout=_DEAD_AFTER_SECONDS,
            delete_jobs=DeleteJobCondition.ALWAYS,
        )

    async def _revive(self) -> None:
        """Gives chores of processes that died to those that live."""
        manager = self._app.job_manager
        while True:
            for job in await manager.get_stalled_jobs(seconds_since_heartbeat=_DEAD_AFTER_SECONDS):
                log.warning("doing again what a lost process did", chore=job.task_name, arguments=job.task_kwargs)
                await manager.retry_job(job)
            await asyncio.sleep(_HEARTBEAT_SECONDS)  # a dead process tells nobody


class _Again(procrastinate.BaseRetryStrategy):
    """At once after the end of a process, else after a wait that doubles."""

    def __init__(self, first_wait_seconds: float) -> None:
        self._first_wait_seconds = first_wait_seconds

    def get_retry_decision(self, *, exception: BaseException, job: Job) -> procrastinate.RetryDecision:
        """When to try again."""
        if isinstance(exception, asyncio.CancelledError):
            return procrastinate.RetryDecision(retry_in={"seconds": 0})
        wait_seconds = min(self._first_wait_seconds * 2 ** min(job.attempts, _MAX_DOUBLINGS), _MAX_WAIT_SECONDS)
        return procrastinate.RetryDecision(retry_in={"milliseconds": int(wait_seconds * 1000)})
