"""What only SQL can show of identity's store: what is stored, kept and made twice at once."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
import sqlalchemy as sa

from services.common.audit import Audit
from services.common.database import Database
from services.common.errors import Unavailable
from services.identity.rows import ApiKey, Role, Secret, User
from services.identity.store import IdentityStore
from tests.serving import AUDIT_KEY

ADMINS = Role(role_name="admins", creator="ESD", permissions=["b:all", "a:all"])
FIRST = User(username="first", roles=["admins"], creator="ESD")


def first_key(key_hash: str) -> ApiKey:
    return ApiKey(key_hash=key_hash, owner="first", impersonate=True)


async def use(store: IdentityStore, key_hash: str, username: str | None) -> tuple[object, ...]:
    """What a key without an end gives: its owner, whether it may impersonate, the user's roles and permissions."""
    found = await store.find_key_use(key_hash, username)
    assert found is not None
    assert found.seconds_left is None
    return found.owner, found.impersonate, found.roles, found.permissions


@pytest.fixture
def database_url(lend_database: Callable[[str], str]) -> str:
    return lend_database("identity")


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = Database(database_url)
    yield database
    await database.dispose()


@pytest.fixture
async def store(database: Database) -> IdentityStore:
    return IdentityStore(database, Audit("identity", AUDIT_KEY))


async def _count(database: Database, table: str) -> int:
    async with database.transaction() as session:
        return int((await session.execute(sa.text(f"SELECT count(*) FROM {table}"))).scalar_one())


async def test_many_bootstraps_at_once_make_everything_once(store: IdentityStore, database: Database) -> None:
    await asyncio.gather(*(store.bootstrap([ADMINS], FIRST, first_key("hash")) for _ in range(6)))
    assert [await _count(database, table) for table in ("roles", "users", "api_keys")] == [1, 1, 1]


async def test_a_bootstrap_keeps_what_was_changed_and_adds_a_new_key(store: IdentityStore) -> None:
    await store.bootstrap([ADMINS], FIRST, first_key("old"))
    await store.save_user(User(username="first", roles=[], creator="ann", password_hash="h"))
    await store.bootstrap([ADMINS], FIRST, first_key("new"))
    (user,) = await store.find_users("first")
    assert (user.creator, user.password_hash) == ("ann", "h")
    for key_hash in ("old", "new"):
        assert await use(store, key_hash, None) == ("first", True, [], [])


async def test_a_key_is_used_by_its_owner_or_by_whom_the_request_names(store: IdentityStore) -> None:
    await store.bootstrap([ADMINS, Role(role_name="r", creator="x", permissions=["a:all"])], FIRST, first_key("hash"))
    await store.save_user(User(username="ann", roles=["r", "gone"], creator="first"))
    assert await use(store, "hash", None) == ("first", True, ["admins"], ["a:all", "b:all"])
    assert await use(store, "hash", "ann") == ("first", True, ["r", "gone"], ["a:all"])
    assert await use(store, "hash", "nobody") == ("first", True, None, [])
    assert await store.find_key_use("other", "ann") is None


async def test_a_role_of_another_creator_is_replaced_only_when_that_is_allowed(store: IdentityStore) -> None:
    mine = Role(role_name="r", creator="ann", permissions=["a:all"])
    theirs = Role(role_name="r", creator="bob", permissions=["b:all"])
    assert await store.save_role(mine, "ann")
    assert not await store.save_role(theirs, "bob")
    assert (await store.find_roles(["r"]))[0].creator == "ann"
    assert await store.save_role(theirs, None)
    assert (await store.find_roles(["r"]))[0].permissions == ["b:all"]


async def test_removed_roles_leave_the_others_of_a_user_in_order(store: IdentityStore) -> None:
    await store.save_user(User(username="ann", roles=["d", "a", "c", "b"], creator="x"))
    await store.remove_roles(["a", "b", "unheard of"])
    assert (await store.find_users("ann"))[0].roles == ["d", "c"]


async def test_keys_end_with_their_owner_and_none_is_made_for_nobody(store: IdentityStore) -> None:
    await store.bootstrap([ADMINS], FIRST, first_key("hash"))
    await store.remove_users(["first"])
    assert await store.find_keys() == []
    assert await store.find_key_use("hash", None) is None
    assert not await store.add_key(ApiKey(key_hash="x", owner="first"))
    await store.save_user(FIRST.model_copy())
    assert await store.find_key_use("hash", None) is None, "nor does it come back with another user of the name"


async def test_a_first_user_who_was_deleted_comes_back_with_a_new_key_only(store: IdentityStore) -> None:
    await store.bootstrap([ADMINS], FIRST, first_key("old"))
    await store.save_user(User(username="ann", roles=["admins"], creator="first"))
    await store.remove_users(["first"])
    await store.bootstrap([ADMINS], FIRST, first_key("old"))
    assert await store.find_users("first") == []
    assert await store.find_key_use("old", "ann") is None
    await store.bootstrap([ADMINS], FIRST, first_key("new"))
    assert await use(store, "new", None) == ("first", True, ["admins"], ["a:all", "b:all"])
    assert await store.find_key_use("old", None) is None


async def test_a_key_of_nobody_opens_nothing(store: IdentityStore, database: Database) -> None:
    await store.bootstrap([ADMINS], FIRST, first_key("hash"))
    await store.save_user(User(username="ann", roles=["admins"], creator="first"))
    async with database.transaction() as session:
        await session.execute(sa.text("DELETE FROM users WHERE username = 'first'"))
    assert await store.find_key_use("hash", None) is None
    assert await store.find_key_use("hash", "ann") is None


async def test_a_secret_is_replaced_not_added(store: IdentityStore, database: Database) -> None:
    for secret_hash in ("one", "two"):
        await store.save_secret(Secret(kind="worker", subject="e", secret_hash=secret_hash))
    await store.save_secret(Secret(kind="trainer", subject="e", secret_hash="three"))
    assert await store.find_secret("one") is None
    assert await store.find_secret("two") == Secret(kind="worker", subject="e", secret_hash="two")
    await store.remove_secret("worker", "e")
    assert await _count(database, "secrets") == 1


async def test_a_database_that_is_down_is_unavailable() -> None:
    database = Database("postgresql+psycopg://nobody@127.0.0.1:1/none")
    with pytest.raises(Unavailable, match="does not answer"):
        await IdentityStore(database, Audit("identity", AUDIT_KEY)).find_users()
    await database.dispose()
