"""The audit: a table per service of who changed what, when and from where, which nobody can alter unseen.

A row is written in the transaction of the change that it is about. Its mac is made, with a key that lies outside the
database, of its own content and of the mac of the row before: whoever has only the database can neither alter nor
remove nor reorder rows, nor slip one in, without `verify` telling so. What a chain cannot show is that rows were cut
off at its end. Therefore the service logs its head (the last row's sequence and mac) at its start and end, and every
minute in which it changed, and `verify` looks for the rows of these heads: rows cut off after the last logged head are
the only ones whose loss cannot be seen. (Heads are logged as information: `log_level` must not be above that.)
"""

from __future__ import annotations

import asyncio
import hmac
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa
import structlog
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncSession

from services.common.auth import Kind, current_origin, find_caller
from services.common.database import Database
from services.common.errors import Unavailable
from services.common.process import refuse
from services.common.settings import read_secret

log = structlog.get_logger()

HIDDEN = "********"  # stands for a value that must not be written down
_HEAD_SECONDS = 60.0
_LOCK = 0x61756474  # any number will do, as long as all replicas take the same
_MIN_KEY_LENGTH = 32
_NO_MAC = ""  # what the first row is chained to

# For the services' migrations. Once published it does not change: a later form of the table is a later migration.
CREATE_TABLE = (
    """
    CREATE TABLE audit (
        sequence bigint PRIMARY KEY,
        at timestamptz NOT NULL,
        kind text NOT NULL,
        actor text NOT NULL,
        key_owner text NOT NULL,
        address text NOT NULL,
        request_id text NOT NULL,
        action text NOT NULL,
        target text NOT NULL,
        changes jsonb NOT NULL,
        mac text NOT NULL
    )
    """,
    """
    CREATE FUNCTION refuse_change_of_audit() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'the audit is append-only: % is refused', TG_OP; END $$
    """,
    """
    CREATE TRIGGER audit_is_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change_of_audit()
    """,
)
DROP_TABLE = ("DROP TABLE audit", "DROP FUNCTION refuse_change_of_audit()")

_COLUMNS = ("at", "kind", "actor", "key_owner", "address", "request_id", "action", "target", "changes")
_TABLE = sa.table(
    "audit",
    sa.column("sequence", sa.BigInteger),
    sa.column("at", sa.DateTime(timezone=True)),
    *(sa.column(name, sa.Text) for name in _COLUMNS[1:-1]),
    sa.column("changes", JSONB),
    sa.column("mac", sa.Text),
)
_LAST = sa.select(_TABLE.c.sequence, _TABLE.c.mac).order_by(_TABLE.c.sequence.desc()).limit(1)


class Head(NamedTuple):
    """The last row of a chain; 0 and an empty mac for a chain without rows."""

    sequence: int = 0
    mac: str = _NO_MAC


class Audit:
    """Writes the audit of one service; `key` is the content of its key file."""

    def __init__(self, service: str, key: str) -> None:
        self._service = service
        self._key = key.encode()

    @classmethod
    def from_file(cls, service: str, path: Path) -> Audit:
        """Reads the key.

        Raises:
            SystemExit: there is none, or it is too short.
        """
        key = read_secret(path)
        if len(key) < _MIN_KEY_LENGTH:
            refuse(f"setting ESD_AUDIT_KEY_FILE: {path} holds fewer than {_MIN_KEY_LENGTH} characters")
        return cls(service, key)

    async def record(
        self,
        session: AsyncSession,
        action: str,
        target: str,
        before: Mapping[str, Any] | None = None,
        after: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes who changed the target just now, as a part of the session's transaction; nothing if nothing differs.

        `before` and `after` are the fields that may be written down, of JSON's types without fractions; None where the
        target did not exist. From here on the transaction holds the end of the chain, so it must not wait for anything
        that another may hold: record last.
        """
        changes = differences(before or {}, after or {})
        if not changes:
            return
        await session.flush()
        caller, origin = find_caller(), current_origin()
        await session.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
        last = await _head(session)
        row = {
            "sequence": last.sequence + 1,
            "at": datetime.now(UTC),
            "kind": str(caller.kind if caller else Kind.SERVICE),
            "actor": caller.name if caller else self._service,
            "key_owner": caller.key_owner if caller else "",
            "address": origin.address,
            "request_id": origin.request_id,
            "action": action,
            "target": target,
            "changes": changes,
        }
        await session.execute(sa.insert(_TABLE).values(**row, mac=_mac(self._key, last.mac, row)))

    async def log_heads(self, database: Database) -> None:
        """Logs the chain's head now, every minute in which it changed, and when this is cancelled."""
        logged = await self._log_head(database, None)
        try:
            while True:
                await asyncio.sleep(_HEAD_SECONDS)
                logged = await self._log_head(database, logged)
        finally:
            await self._log_head(database, None)

    async def _log_head(self, database: Database, logged: Head | None) -> Head | None:
        try:
            async with database.transaction() as session:
                head = await _head(session)
        except Unavailable as error:
            log.warning("the audit's head is not known", error=str(error))
            return logged
        if head != logged:
            log.info("audit head", sequence=head.sequence, mac=head.mac)
        return head


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`{field: {"from": …, "to": …}}` of the fields that differ; a side that has no such field is left out."""
    changes: dict[str, dict[str, Any]] = {}
    for name in {**before, **after}:
        sides = {"from": before.get(name), "to": after.get(name)}
        if sides["from"] != sides["to"]:
            changes[name] = {side: value for side, value in sides.items() if value is not None}
    return changes


@dataclass
class Verdict:
    """What `verify` found: how many rows, the head, and a sentence for each thing that is wrong."""

    num_rows: int = 0
    head: Head = field(default_factory=Head)
    problems: list[str] = field(default_factory=list)


async def verify(database: Database, key: str, logged: Iterable[Head] = ()) -> Verdict:
    """Goes through the chain, and looks for the rows of the logged heads.

    Raises:
        Unavailable: the database does not answer.
    """
    verdict, wanted = Verdict(), set(logged)
    by_sequence = {head.sequence for head in wanted}
    found: set[Head] = {Head()}
    async with database.transaction() as session:
        rows = await session.stream(sa.select(_TABLE).order_by(_TABLE.c.sequence))
        async for row in rows.mappings():
            verdict.num_rows += 1
            head, last = Head(row["sequence"], row["mac"]), verdict.head
            if head.sequence != last.sequence + 1:
                verdict.problems.append(_gap(last.sequence + 1, head.sequence - 1))
            elif not hmac.compare_digest(head.mac, _mac(key.encode(), last.mac, row)):
                verdict.problems.append(f"row {head.sequence} was altered, or is not where it was written")
            if head.sequence in by_sequence:
                found.add(head)
            verdict.head = head
    for head in sorted(wanted - found):
        if head.sequence > verdict.head.sequence:
            verdict.problems.append(_gap(verdict.head.sequence + 1, head.sequence) + ": the log has it as head")
        else:
            verdict.problems.append(f"row {head.sequence} is not the one that the log has as head")
    return verdict


def logged_heads(text: str) -> dict[str, set[Head]]:
    """The heads in a log, of whichever format, by the service that logged them."""
    heads: dict[str, set[Head]] = {}
    for line in text.splitlines():
        if "audit head" not in line:
            continue
        words = dict(re.findall(r'"?(service|sequence|mac)"?(?:=|: ?)[\'"]?(\w*)', re.sub(r"\x1b\[[\d;]*m", "", line)))
        if words.keys() == {"service", "sequence", "mac"} and words["sequence"].isdecimal():
            heads.setdefault(words["service"], set()).add(Head(int(words["sequence"]), words["mac"]))
    return heads


async def _head(session: AsyncSession) -> Head:
    row = (await session.execute(_LAST)).one_or_none()
    return Head() if row is None else Head(*row)


def _mac(key: bytes, previous: str, row: Mapping[Any, Any]) -> str:
    """The mac of a row: HMAC-SHA256 of the mac before it, its sequence and its columns, as JSON in one exact form."""
    at = row["at"].astimezone(UTC).isoformat(timespec="microseconds")
    content = [previous, row["sequence"], at, *(row[name] for name in _COLUMNS[1:])]
    return hmac.new(key, json.dumps(content, sort_keys=True, separators=(",", ":")).encode(), "sha256").hexdigest()


def _gap(first: int, last: int) -> str:
    return f"row {first} is missing" if first == last else f"rows {first} to {last} are missing"
