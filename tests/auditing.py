"""Owns how tests read a service's audit: what was written since they last looked.

trail = await Trail.begin(database)
…
assert await trail.new() == [("role.create", "designers")]
"""

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from services.common.audit import verify
from services.common.database import Database
from tests.serving import AUDIT_KEY, Metadata

# What Envoy adds to a request: the last address is what it saw, the first what the client claims.
THROUGH_GATEWAY = (("x-forwarded-for", "10.9.9.9, 192.0.2.7"), ("x-request-id", "request-1"))


@dataclass
class Trail:
    """The audit from some row on. `rows` are the last ones that `new` saw, with all their columns."""

    database: Database
    seen: int
    rows: list[dict[str, Any]]

    @classmethod
    async def begin(cls, database: Database) -> "Trail":
        """From now on."""
        trail = cls(database, 0, [])
        await trail.new()
        return trail

    async def new(self) -> list[tuple[str, str]]:
        """(action, target) of what was written since, from a chain that is whole."""
        statement = sa.text("SELECT * FROM audit WHERE sequence > :seen ORDER BY sequence")
        async with self.database.transaction() as session:
            found = await session.execute(statement, {"seen": self.seen})
            self.rows = [dict(row) for row in found.mappings()]
        self.seen += len(self.rows)
        assert (await verify(self.database, AUDIT_KEY)).problems == []
        return [(row["action"], row["target"]) for row in self.rows]

    async def text(self) -> str:
        """All that the table holds."""
        async with self.database.transaction() as session:
            return str((await session.execute(sa.text("SELECT string_agg(audit::text, ' ') FROM audit"))).scalar())


def through_gateway(metadata: Metadata) -> Metadata:
    """The metadata with what the gateway adds."""
    return (*metadata, *THROUGH_GATEWAY)
