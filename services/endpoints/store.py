"""Remembers endpoints and workers, and holds the lock that elects the one control loop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Table, delete, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from services.common.audit import Audit
from services.common.database import Database, notify
from services.common.errors import FailedPrecondition, NotFound, Unavailable
from services.endpoints.event_store import Happening, remember
from services.endpoints.rows import (
    CREATED,
    CREATING,
    DELETING,
    FAILED,
    IN_SERVICE,
    SCALED_IN,
    SCALED_OUT,
    UPDATED,
    UPDATING,
    WORKER_ENDED,
    WORKER_STARTED,
    WORKER_WAITS,
    Endpoint,
    Worker,
)
from services.endpoints.scaling import Scale

CHANGED = "endpoints_changed"  # the NOTIFY channel that wakes the control loop
_LEADER_LOCK = 0x656E6470  # any numbers will do, as long as all replicas take the same
_CREATE_LOCK = 0x656E6471
# What nobody may have changed since an endpoint was read by who now decides for it.
_DECISIVE = ("id", "status", "autoscaling", "num_min", "num_max", "num_workers")


class RoleHasEndpoint(FailedPrecondition):
    """A role may own one live endpoint."""


class NameInUse(FailedPrecondition):
    """A live endpoint has this name."""


class EndpointNotFound(NotFound):
    """There is no such endpoint, or not for this caller."""


_LIVE_ENDPOINTS = select(Endpoint).where(col(Endpoint.status) != DELETING)
_ENDPOINTS: Table = Endpoint.__table__  # type: ignore[attr-defined]
_NEWEST_LIVE = (
    select(_ENDPOINTS).where(_ENDPOINTS.c.status != DELETING).order_by(_ENDPOINTS.c.start_time.desc(), _ENDPOINTS.c.id)
)


class EndpointStore:
    """The endpoints' database. Each method is one transaction."""

    def __init__(self, database: Database, audit: Audit) -> None:
        self._database = database
        self._audit = audit

    async def add_endpoint(self, endpoint: Endpoint) -> None:
        """Adds a row.

        Raises:
            RoleHasEndpoint, NameInUse.
        """
        async with self._database.transaction() as session:
            await session.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _CREATE_LOCK})
            existing = (await session.execute(_LIVE_ENDPOINTS)).scalars().all()
            taken = {role for other in existing for role in other.owners}
            for role in endpoint.owners:
                if role in taken:
                    raise RoleHasEndpoint(f"role [{role}] has a valid endpoint already, not allow to have another one")
            if any(other.name == endpoint.name for other in existing):
                raise NameInUse(
                    f'Cannot create already existing model "{endpoint.name}": there is an endpoint of this name'
                )
            session.add(endpoint)
            await session.flush()
            await remember(session, endpoint.id, Happening(CREATED, f"asked for by {endpoint.creator}"))
            await notify(session, CHANGED, endpoint.id)
            await self._audit.record(session, "endpoint.create", endpoint.name, after=endpoint.facts())

    async def get_all_live(self) -> list[Endpoint]:
        """All endpoints that are not being deleted, newest first. They are few: a role owns at most one.

        Asked at every job, hence not by a session.
        """
        return [Endpoint(**row) for row in await self._database.run(_NEWEST_LIVE)]

    async def get_all(self) -> list[Endpoint]:
        """All endpoints, those that are being deleted too."""
        async with self._database.transaction() as session:
            return list((await session.execute(select(Endpoint))).scalars())

    async def get_live(self, endpoint_id: str) -> Endpoint:
        """The endpoint, unless it is being deleted.

        Raises:
            EndpointNotFound.
        """
        async with self._database.transaction() as session:
            found: Endpoint | None = await session.scalar(_LIVE_ENDPOINTS.where(col(Endpoint.id) == endpoint_id))
        if found is None:
            raise EndpointNotFound(f"endpoint with id {endpoint_id} is not found")
        return found

    async def update_endpoint(self, before: Endpoint, values: dict[str, Any], message: str) -> bool:
        """Changes an endpoint as somebody asked. False: it is not as it was read any more."""
        async with self._database.transaction() as session:
            await notify(session, CHANGED, before.id)
            updated = Happening(UPDATED, message)
            return bool(await self._change(session, "endpoint.update", _as_read(before), values, updated))

    async def mark_deleting(self, names: list[str]) -> None:
        """Frees the names and roles of these endpoints at once; the control loop does the rest."""
        wanted = col(Endpoint.name).in_(names), col(Endpoint.status) != DELETING
        async with self._database.transaction() as session:
            await notify(session, CHANGED, "")
            deletion = Happening(DELETING, "its workers finish what they run and leave; its jobs go elsewhere")
            await self._change(session, "endpoint.delete", wanted, {"status": DELETING}, deletion)

    async def set_num_live(self, endpoint_id: str, num_live: int) -> None:
        """Remembers how many workers were seen."""
        await self._update(endpoint_id, num_live=num_live)

    async def set_in_service(self, endpoint_id: str, now: datetime) -> None:
        """Brings an endpoint into service: a new one, or one whose number of workers has changed."""
        arrived = Happening(IN_SERVICE, "its workers are as many as wanted, and have reached the queue")
        await self._update(endpoint_id, [CREATING, UPDATING], arrived, status=IN_SERVICE, end_time=now)

    async def set_scale(self, endpoint: Endpoint, scale: Scale, reason: str) -> bool:
        """Remembers what was decided, and why if it counts. False: the endpoint has changed since it was read."""
        values: dict[str, Any] = asdict(scale)
        happening = None
        if scale.num_workers != endpoint.num_workers:
            word = SCALED_OUT if scale.num_workers > endpoint.num_workers else SCALED_IN
            happening = Happening(word, f"from {endpoint.num_workers} to {scale.num_workers} workers: {reason}")
            if endpoint.status == IN_SERVICE:
                values["status"] = UPDATING
        async with self._database.transaction() as session:
            return bool(await self._change(session, "endpoint.update", _as_read(endpoint), values, happening))

    async def tell_obstacle(self, endpoint_id: str, obstacle: str) -> None:
        """Remembers what a worker waits for, among the endpoint's events."""
        async with self._database.transaction() as session:
            await remember(session, endpoint_id, Happening(WORKER_WAITS, f"a worker has not started: {obstacle}"))

    async def set_failed(self, endpoint_id: str, error: str) -> None:
        """Gives an endpoint up."""
        states = [CREATING, IN_SERVICE, UPDATING]
        await self._update(endpoint_id, states, Happening(FAILED, error), status=FAILED, error=error, num_live=0)

    async def set_retired(self, endpoint_id: str) -> None:
        """Remembers that the queue knows."""
        await self._update(endpoint_id, is_retired=True)

    async def set_pins_told(self, endpoint: Endpoint) -> None:
        """Remembers that the queue knows these pins; not if there are others by now."""
        told = update(Endpoint).where(col(Endpoint.id) == endpoint.id, col(Endpoint.pinned) == endpoint.pinned)
        async with self._database.transaction() as session:
            await session.execute(told.values(are_pins_told=True))

    async def remove_endpoint(self, endpoint_id: str) -> None:
        """Removes the row, and those of its workers."""
        async with self._database.transaction() as session:
            removed = await session.execute(delete(Endpoint).where(col(Endpoint.id) == endpoint_id).returning(Endpoint))
            for endpoint in removed.scalars().all():
                await self._audit.record(session, "endpoint.remove", endpoint.name, before=endpoint.facts())

    async def get_workers(self) -> list[Worker]:
        """The workers of all endpoints."""
        async with self._database.transaction() as session:
            found = await session.execute(select(Worker).order_by(col(Worker.endpoint_id), col(Worker.slot)))
            return list(found.scalars())

    async def add_worker(self, worker: Worker) -> None:
        """Adds an empty place, if it is not there."""
        async with self._database.transaction() as session:
            await session.execute(insert(Worker).values(worker.model_dump()).on_conflict_do_nothing())

    async def claim_launch(self, worker: Worker) -> bool:
        """Records a process as the worker's, unless another control loop was first.

        `worker` is the row as read, with `num_launches` raised by one and the new process in it.
        """
        launched = (
            _worker(worker, worker.num_launches - 1)
            .values(num_launches=worker.num_launches, was_live=False)
            .values(pid=worker.pid, start_time=worker.start_time, gpu=worker.gpu)
        )
        where = f" on GPU {worker.gpu}" if worker.gpu is not None else ""
        started = Happening(WORKER_STARTED, f"worker {worker.slot}, process {worker.pid}{where}")
        return await self._change_worker(worker, launched, started)

    async def set_worker_live(self, worker: Worker) -> None:
        """Remembers that the worker's present process reached the queue."""
        async with self._database.transaction() as session:
            await session.execute(_worker(worker, worker.num_launches).values(was_live=True, num_failures=0))

    async def set_worker_ended(self, worker: Worker, num_failures: int, reason: str) -> None:
        """Remembers that the worker's present process is no more, and why."""
        ended = _worker(worker, worker.num_launches).where(col(Worker.pid) == worker.pid)
        ended = ended.values(pid=None, start_time=None, num_failures=num_failures)
        happening = Happening(WORKER_ENDED, f"worker {worker.slot}, process {worker.pid}: {reason}")
        await self._change_worker(worker, ended, happening)

    async def _change_worker(self, worker: Worker, change: Any, happening: Happening) -> bool:
        async with self._database.transaction() as session:
            result: Any = await session.execute(change)
            if result.rowcount:
                await remember(session, worker.endpoint_id, happening)
            return bool(result.rowcount)

    async def remove_worker(self, worker: Worker) -> None:
        """Removes a place whose process has ended."""
        async with self._database.transaction() as session:
            await session.execute(delete(Worker).where(*_place(worker)))

    @asynccontextmanager
    async def leadership(self) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """Waits until this process is the one that may run the control loop, and remains it while the block runs.

        The lock hangs on a connection. The yielded function confirms that it is still there.

        Raises:
            Unavailable: the connection, and with it the lock, is lost.
        """
        try:
            async with self._database.engine.connect() as plain:
                connection = await plain.execution_options(isolation_level="AUTOCOMMIT")
                await connection.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": _LEADER_LOCK})

                async def confirm() -> None:
                    await connection.execute(text("SELECT 1"))

                try:
                    yield confirm
                finally:
                    await connection.invalidate()  # closing it frees the lock; going back to the pool would not
        except DBAPIError as error:
            raise Unavailable("the database does not answer at present") from error

    async def _update(
        self, endpoint_id: str, statuses: Sequence[str] = (), happening: Happening | None = None, **values: Any
    ) -> None:
        wanted = [col(Endpoint.id) == endpoint_id, *([col(Endpoint.status).in_(statuses)] if statuses else [])]
        async with self._database.transaction() as session:
            await self._change(session, "endpoint.update", wanted, values, happening)

    async def _change(
        self,
        session: AsyncSession,
        action: str,
        wanted: Sequence[ColumnElement[bool]],
        values: dict[str, Any],
        happening: Happening | None = None,
    ) -> int:
        """Gives these endpoints the values, and tells the audit and the events of each. Answers how many they are."""
        query = select(Endpoint).where(*wanted).order_by(col(Endpoint.id)).with_for_update()
        found = (await session.execute(query)).scalars().all()
        for endpoint in found:
            before = endpoint.facts()
            endpoint.sqlmodel_update(values)
            await self._audit.record(session, action, endpoint.name, before, endpoint.facts())
            if happening is not None:
                await remember(session, endpoint.id, happening)
        return len(found)


def _as_read(endpoint: Endpoint) -> list[ColumnElement[bool]]:
    return [getattr(Endpoint, name) == getattr(endpoint, name) for name in _DECISIVE]


def _place(worker: Worker) -> tuple[ColumnElement[bool], ...]:
    return col(Worker.endpoint_id) == worker.endpoint_id, col(Worker.slot) == worker.slot


def _worker(worker: Worker, num_launches: int) -> Any:
    """A change of the worker's row, if so many launches is still what it has."""
    return update(Worker).where(*_place(worker), col(Worker.num_launches) == num_launches)
