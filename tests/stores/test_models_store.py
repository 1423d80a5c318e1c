"""The tables of the models service: names, pages, resolving, and what happens to rows that are deleted meanwhile."""

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa

from services.common.audit import Audit
from services.common.database import Database
from services.common.errors import FailedPrecondition, ResourceExhausted
from services.common.viewer import Viewer
from services.models.chores import Chores
from services.models.import_store import Import, ImportStore
from services.models.rows import ACTIVE, DISABLED, INITIAL, Checkpoint, CheckpointFile
from services.models.store import (
    CheckpointNotFound,
    Filters,
    Inspected,
    ModelStore,
    NameInUse,
    count_statement,
    page_statement,
)
from tests.serving import AUDIT_KEY

ANN = Viewer("ann", ["designer"])
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def database_url(lend_database: Callable[[str], str]) -> str:
    return lend_database("models")


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = Database(database_url, pool_size=4)
    yield database
    await database.dispose()


@pytest.fixture
async def store(database: Database, database_url: str) -> ModelStore:
    chores = Chores(database_url)
    await chores.prepare()
    return ModelStore(database, chores, Audit("models", AUDIT_KEY))


def checkpoint(*names: str, owners: tuple[str, ...] = ("designer",), age: int = 0) -> Checkpoint:
    made = Checkpoint(
        id=uuid4(), type="Lora", owners=list(owners), created_at=BEGIN - timedelta(seconds=age), params={"m": 1}
    )
    for position, name in enumerate(names):
        made.files.append(
            CheckpointFile(checkpoint_id=made.id, position=position, name=name, key=name, upload_id="u", parts_number=1)
        )
    return made


async def test_a_page_holds_what_the_viewer_sees_newest_first(store: ModelStore) -> None:
    for age, owners in enumerate([(), ("*",), ("ann",), ("designer", "x"), ("x",)]):
        await store.add_checkpoint(checkpoint(f"{age}b", f"{age}a", owners=owners, age=age))
    rows, total = await store.page_checkpoints(Filters([ANN]), 1, 3)
    assert total == 4
    assert [row.names for row in rows] == [["0b", "0a"], ["1b", "1a"], ["2b", "2a"]]
    rows, _ = await store.page_checkpoints(Filters([ANN]), 2, 3)
    assert [row.names for row in rows] == [["3b", "3a"]]
    assert (await store.page_checkpoints(Filters([ANN, Viewer("x", [])]), 1, 9))[1] == 3
    assert (await store.page_checkpoints(Filters([Viewer("", [], sees_everything=True)]), 1, 9))[1] == 5
    assert (await store.page_checkpoints(Filters(owners=["x"]), 1, 9))[1] == 2
    assert await store.page_checkpoints(Filters([ANN], statuses=[ACTIVE], types=["Lora"]), 1, 9) == ([], 0)


async def test_a_page_of_many_uses_the_index(store: ModelStore, database: Database) -> None:
    async with database.transaction() as session:
        await session.execute(
            sa.text(
                "INSERT INTO checkpoints SELECT gen_random_uuid(), 'Lora', 'Active', '{designer}', "
                "now() - n * interval '1 second', '{}' FROM generate_series(1, 5000) n"
            )
        )
        await session.execute(sa.text("ANALYZE checkpoints"))
        plan = await session.execute(
            sa.text("EXPLAIN SELECT * FROM checkpoints ORDER BY created_at DESC, id DESC LIMIT 10")
        )
        assert "checkpoints_newest" in "\n".join(plan.scalars())


async def test_of_two_who_want_a_name_one_gets_it(store: ModelStore) -> None:
    results = await asyncio.gather(
        store.add_checkpoint(checkpoint("a")), store.add_checkpoint(checkpoint("a")), return_exceptions=True
    )
    assert [type(result) for result in results if result] == [NameInUse]
    assert await store.find_used_name(["b", "a"]) == "a"
    assert await store.find_used_name(["b"]) is None


async def test_a_checkpoint_is_active_when_all_files_are_complete(store: ModelStore) -> None:
    made = checkpoint("a", "b")
    await store.add_checkpoint(made)
    await store.save_complete(made.id, "a", Inspected(5, "ff", {"format": "torch"}))
    for status in (ACTIVE, DISABLED):  # a disabled one would keep its open uploads for ever
        assert (await store.save_status(made.id, status)).status == INITIAL
    await store.save_complete(made.id, "b", Inspected(6, ""))
    assert (await store.save_status(made.id, ACTIVE)).status == ACTIVE
    kept = await store.get_checkpoint(made.id)
    assert kept.params == {"m": 1, "size": {"a": 5, "b": 6}, "sha256": {"a": "ff", "b": ""}, "format": {"a": "torch"}}
    found = await store.resolve_files([("Lora", "b"), ("VAE", "a"), ("Lora", "z")], ANN)
    (file,) = found.values()
    assert list(found) == [("Lora", "b")]
    assert (file.checkpoint_id, file.size_bytes, file.all_names) == (made.id, 6, ["a", "b"])
    assert await store.resolve_files([("Lora", "b")], Viewer("bob", [])) == {}


async def test_a_file_may_be_larger_than_numbers_of_32_bits(store: ModelStore) -> None:
    made = checkpoint("a")
    await store.add_checkpoint(made)
    await store.save_complete(made.id, "a", Inspected(7_000_000_000, "ff"), ACTIVE)
    kept = await store.get_checkpoint(made.id)
    assert (kept.status, kept.files[0].size_bytes, kept.params["size"]) == (ACTIVE, 7_000_000_000, {"a": 7_000_000_000})
    found = await store.resolve_files([("Lora", "a")], ANN)
    assert found["Lora", "a"].size_bytes == 7_000_000_000


async def test_a_refusal_frees_the_names(store: ModelStore) -> None:
    made = checkpoint("a")
    await store.add_checkpoint(made)
    await store.save_refusal(made.id, "bad")
    kept = await store.get_checkpoint(made.id)
    assert (kept.status, kept.error, kept.params["error"]) == (DISABLED, "bad", "bad")
    assert (await store.save_status(made.id, ACTIVE)).status == DISABLED
    await store.add_checkpoint(checkpoint("a"))


async def test_changes_to_a_checkpoint_that_is_gone_say_so(store: ModelStore) -> None:
    made = checkpoint("a")
    await store.add_checkpoint(made)
    await store.remove_checkpoints({made.id: "prefix/"})
    await store.save_refusal(made.id, "bad")
    with pytest.raises(CheckpointNotFound, match=str(made.id)):
        await store.save_complete(made.id, "a", Inspected(1, ""))
    with pytest.raises(CheckpointNotFound):
        await store.save_status(made.id, ACTIVE)
    with pytest.raises(CheckpointNotFound):
        await store.get_checkpoint(made.id)
    assert await store.find_checkpoints([made.id]) == []


async def test_files_of_a_checkpoint_that_has_ended_are_not_replaced(store: ModelStore) -> None:
    made = checkpoint("a")
    await store.add_checkpoint(made)
    new = CheckpointFile(checkpoint_id=made.id, position=0, name="a", key="a", upload_id="", parts_number=0)
    assert [file.name for file in await store.save_files(made.id, [new]) or ()] == ["a"]
    await store.save_complete(made.id, "a", Inspected(5, "ff"), ACTIVE)
    assert await store.save_files(made.id, [new]) is None
    (file,) = (await store.get_checkpoint(made.id)).files
    assert (file.complete, file.size_bytes) == (True, 5)


async def test_of_two_who_rename_a_file_the_later_is_told_that_it_has_another_name(store: ModelStore) -> None:
    made = checkpoint("a")
    await store.add_checkpoint(made)
    await store.save_name(made.id, "a", "b", "b")
    with pytest.raises(FailedPrecondition, match="a was renamed to b meanwhile"):
        await store.save_name(made.id, "a", "c", "c")


async def test_active_checkpoints_can_be_kept_when_others_go(store: ModelStore, database: Database) -> None:
    rows = [checkpoint("a"), checkpoint("b")]
    for row in rows:
        await store.add_checkpoint(row)
    await store.save_complete(rows[0].id, "a", Inspected(5, "ff"), ACTIVE)
    prefixes = {row.id: f"{row.names[0]}/" for row in rows}
    assert await store.remove_checkpoints(prefixes, keeps_active=True) == [rows[0].id]
    assert [row.names for row in await store.find_checkpoints(list(prefixes))] == [["a"]]
    async with database.transaction() as session:
        found = await session.execute(sa.text("SELECT args FROM chores.procrastinate_jobs"))
        assert found.scalars().all() == [{"prefix": "b/"}]


MANY = """
INSERT INTO checkpoints (id, type, status, owners, created_at, params)
SELECT gen_random_uuid(), CASE WHEN n % 1000 = 0 THEN 'VAE' ELSE 'Lora' END, 'Active',
       ARRAY[CASE WHEN n % 2 = 0 THEN 'designer' ELSE 'guest' END], now() - n * interval '1 second', '{}'
FROM generate_series(1, 20000) AS n
"""


async def explained(database: Database, statement: sa.Select[Any]) -> str:
    """The plan of a statement."""
    async with database.engine.connect() as connection:
        compiled = statement.compile(connection.engine, compile_kwargs={"render_postcompile": True})
        rows = await connection.exec_driver_sql(f"EXPLAIN {compiled}", compiled.params)
        return "\n".join(row[0] for row in rows)


async def test_a_page_of_a_long_list_reads_an_index_and_counts_nothing(store: ModelStore, database: Database) -> None:
    async with database.engine.begin() as connection:
        await connection.execute(sa.text(MANY))
        await connection.execute(sa.text("ANALYZE checkpoints"))
        await connection.execute(sa.text("ANALYZE checkpoint_counts"))
    everybody, designer = Viewer("api", [], sees_everything=True), Viewer("ann", ["designer"])
    for filters, index in (
        (Filters([everybody]), "checkpoints_newest"),
        (Filters([designer]), "checkpoints_newest"),
        (Filters([everybody], types=["VAE"]), "checkpoints_newest_of_type"),
    ):
        plan = await explained(database, page_statement(filters, 1, 10))
        assert f"Index Scan using {index} " in plan, plan
        assert "Seq Scan" not in plan, plan
        assert "Sort" not in plan, plan
        plan = await explained(database, count_statement(filters))
        assert " checkpoints" not in plan, plan
    assert (await store.page_checkpoints(Filters([designer]), 1, 10))[1] == 10_000
    assert (await store.page_checkpoints(Filters([everybody], types=["VAE"]), 1, 10))[1] == 20


async def test_counts_follow_every_change(store: ModelStore) -> None:
    async def total(**filters: Any) -> int:
        return (await store.page_checkpoints(Filters(**filters), 1, 1))[1]

    rows = [checkpoint(f"{number}", owners=owners) for number, owners in enumerate([("a",), ("a",), ("b",), ()])]
    for row in rows:
        await store.add_checkpoint(row)
    assert (await total(), await total(owners=["a"]), await total(statuses=[ACTIVE])) == (4, 2, 0)
    assert await total(viewers=[Viewer("x", ["b"])]) == 2, "what nobody owns is everybody's"
    await store.save_refusal(rows[0].id, "broken")
    await store.save_complete(rows[2].id, "2", Inspected(5, "ff"))
    await store.save_status(rows[2].id, DISABLED)
    assert (await total(), await total(statuses=[INITIAL]), await total(statuses=[DISABLED])) == (4, 2, 2)
    await store.remove_checkpoints({row.id: f"{row.id}/" for row in rows[1:]})
    assert (await total(), await total(owners=["a"]), await total(statuses=[INITIAL])) == (1, 1, 0)


async def test_an_import_and_its_chore_are_there_together_or_not_at_all(database: Database, database_url: str) -> None:
    chores = Chores(database_url)
    await chores.prepare()
    imports = ImportStore(database, chores, Audit("models", AUDIT_KEY))

    async def add(*names: str) -> None:
        made = [checkpoint(name) for name in names]
        added = [(each, Import(checkpoint_id=each.id, url=f"https://x/{each.id}")) for each in made]
        await imports.add_imports("ann", added, 0)

    async def count() -> list[int]:
        tables = ("checkpoints", "imports", "chores.procrastinate_jobs", "audit")
        async with database.transaction() as session:
            return [(await session.execute(sa.text(f"SELECT count(*) FROM {table}"))).scalar_one() for table in tables]

    await add("a.pt", "b.pt")
    assert await count() == [2, 2, 2, 2]
    with pytest.raises(NameInUse, match=r"^a\.pt already exists"):
        await add("c.pt", "a.pt")
    assert await count() == [2, 2, 2, 2]


async def test_imports_of_who_has_fewer_come_first(database: Database, database_url: str) -> None:
    chores = Chores(database_url)
    await chores.prepare()
    imports = ImportStore(database, chores, Audit("models", AUDIT_KEY))

    async def add(creator: str, *names: str) -> None:
        made = [checkpoint(name) for name in names]
        for each in made:
            each.params = {"creator": creator}
        await imports.add_imports(
            creator, [(each, Import(checkpoint_id=each.id, url="https://x/")) for each in made], 3
        )

    await add("ann", "a.pt", "b.pt")
    await add("ann", "c.pt")
    await add("bob", "d.pt")
    with pytest.raises(ResourceExhausted, match="3 imports of ann have not ended; with 1 more"):
        await add("ann", "e.pt")
    async with database.transaction() as session:
        found = await session.execute(sa.text("SELECT priority FROM chores.procrastinate_jobs ORDER BY id"))
        assert found.scalars().all() == [0, -1, -2, 0]
