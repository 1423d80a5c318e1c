"""What the code says of a column is what the migrations made of it.

The driver is told a parameter's type by the code. So a number that the table has room for is refused where the code
takes it for a smaller one, and no test with small numbers notices.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlmodel import SQLModel

import services
from services.common.database import Database

SERVICES = ("endpoints", "identity", "inference", "models", "training")
SHARED = "common"  # tables that some services have
SAME = {"VARCHAR": "TEXT", "FLOAT": "DOUBLE PRECISION"}  # the code's words for them


def tables_of(service: str) -> dict[str, sa.Table]:
    """The tables that a service's code names, by name."""
    package = importlib.import_module(f"services.{service}")
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not module.name.endswith("__main__") and ".migrations" not in module.name:
            importlib.import_module(module.name)
    mapped: Any = SQLModel._sa_registry.mappers
    found = [mapper for mapper in mapped if mapper.class_.__module__.split(".")[1] == service]
    return {mapper.local_table.name: mapper.local_table for mapper in found}


def types_of(table: str, columns: Any) -> dict[str, str]:
    """PostgreSQL's names of the types of columns, by table and name."""
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    found = {f"{table}.{column['name']}": column["type"].compile(dialect=dialect) for column in columns}
    return {name: SAME.get(kind, kind) for name, kind in found.items()}


@pytest.mark.parametrize("service", SERVICES)
async def test_columns_are_of_the_types_that_the_code_says(service: str, lend_database: Callable[[str], str]) -> None:
    database = Database(lend_database(service))
    made: dict[str, str] = {}
    async with database.engine.connect() as connection:
        inspector = await connection.run_sync(sa.inspect)
        names = await connection.run_sync(lambda _: inspector.get_table_names())
        for name in names:
            made |= types_of(name, await connection.run_sync(lambda _, name=name: inspector.get_columns(name)))
    await database.dispose()
    said: dict[str, str] = {}
    for name, table in (tables_of(service) | {k: v for k, v in tables_of(SHARED).items() if k in names}).items():
        said |= types_of(name, ({"name": column.name, "type": column.type} for column in table.columns))
    assert said
    assert said == {name: made.get(name) for name in said}


def test_every_service_is_looked_at() -> None:
    found = {module.name for module in pkgutil.iter_modules(services.__path__)}
    assert found == {*SERVICES, SHARED}
