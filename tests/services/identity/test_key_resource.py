"""API keys as a resource, and what protects the last administrator: over the real server and database."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
import sqlalchemy as sa

from esd.identity.v1 import identity_pb2 as pb
from services.identity.rows import User
from services.identity.store import FailedPrecondition, LastAdministrator
from services.identity.tokens import USER_TOKEN_SECONDS
from tests.services.identity.conftest import ALL
from tests.serving import fails

INVALID, PRECONDITION = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION
TIME = "%Y-%m-%d %H:%M:%S.%f"


async def _create(identity: Any, **fields: Any) -> pb.CreateApiKeyResponse:
    return await identity.stub.CreateApiKey(pb.CreateApiKeyRequest(**fields), metadata=identity.admin)


async def _keys(identity: Any, **query: str) -> list[pb.ApiKey]:
    return list((await identity.stub.ListApiKeys(pb.ListApiKeysRequest(**query), metadata=identity.admin)).keys)


async def _revoke(identity: Any, *ids: str) -> None:
    await identity.stub.DeleteApiKeys(pb.DeleteApiKeysRequest(key_id_list=ids), metadata=identity.admin)


async def _is_open(identity: Any, key: str) -> bool:
    return bool((await identity.check(x_api_key=key)).HasField("ok_response"))


async def _sql(identity: Any, statement: str, **values: Any) -> Any:
    async with identity.database.transaction() as session:
        result = await session.execute(sa.text(statement), values)
        return result.all() if result.returns_rows else None


async def test_keys_are_listed_newest_first_without_their_values(identity: Any) -> None:
    await identity.make_user("ann", ["train:all"])
    made = await _create(identity, username="ann", impersonate=True, expires_in_days=30)
    first, second, third = await _keys(identity)
    assert (first.id, first.username, first.prefix, first.impersonate) == (made.id, "ann", made.key[:12], True)
    assert first.created == made.created
    life = datetime.strptime(first.expires, TIME) - datetime.strptime(first.created, TIME)
    assert life == timedelta(days=30)
    assert abs(datetime.strptime(first.created, TIME).replace(tzinfo=UTC) - datetime.now(UTC)) < timedelta(days=1)
    assert (second.username, second.HasField("expires"), second.HasField("last_used")) == ("ann", False, False)
    assert (third.username, third.prefix, third.impersonate) == ("api", identity.first_key[:12], True)
    assert made.key not in str(first)
    assert [key.username for key in await _keys(identity, username="api")] == ["api"]
    assert await _keys(identity, username="unheard of") == []


@pytest.mark.parametrize("days", [0, -1, 3651])
async def test_a_life_out_of_bounds_is_refused(identity: Any, days: int) -> None:
    assert "expires_in_days" in await fails(_create(identity, username="api", expires_in_days=days), INVALID)


async def test_only_holders_of_user_all_manage_keys(identity: Any, user_token: Any) -> None:
    bob = user_token("bob", [permission for permission in ALL if permission != "user:all"])
    denied = grpc.StatusCode.PERMISSION_DENIED
    await fails(identity.stub.ListApiKeys(pb.ListApiKeysRequest(), metadata=bob), denied)
    await fails(identity.stub.DeleteApiKeys(pb.DeleteApiKeysRequest(key_id_list=["x"]), metadata=bob), denied)
    await fails(identity.stub.CreateApiKey(pb.CreateApiKeyRequest(username="api"), metadata=bob), denied)
    for ids in ([], ["x"] * 101, [""]):
        call = identity.stub.DeleteApiKeys(pb.DeleteApiKeysRequest(key_id_list=ids), metadata=identity.admin)
        assert "key_id_list" in await fails(call, INVALID)


async def test_a_revoked_key_is_closed_in_every_replica_once_the_notification_has_come(start_replica: Any) -> None:
    one, other = await start_replica(), await start_replica()
    await one.make_user("ann", ["train:all"])
    made = await _create(one, username="ann")
    assert await _is_open(one, made.key)
    assert await _is_open(other, made.key)
    await _revoke(one, made.id, made.id, "no id", "00000000-0000-4000-8000-000000000000")
    assert not await _is_open(one, made.key), "the same replica knows at once"
    while True:
        other.notified.clear()
        if not await _is_open(other, made.key):
            break
        await other.notified.wait()
    assert made.id not in [key.id for key in await _keys(other)]
    await _revoke(one, made.id)


async def test_a_revoked_first_key_does_not_come_back_at_the_next_start(start_replica: Any) -> None:
    one = await start_replica()
    (first,) = await _keys(one)
    await _revoke(one, first.id)
    again = await start_replica()
    assert not await _is_open(again, one.first_key)
    assert await _keys(again) == []


async def test_a_key_is_closed_when_its_time_is_over_and_still_listed(identity: Any) -> None:
    made = await _create(identity, username="api", expires_in_days=1)
    assert await _is_open(identity, made.key)
    await _sql(identity, "UPDATE api_keys SET expires_at = now() WHERE id = CAST(:id AS uuid)", id=made.id)
    identity.issued.forget()
    assert not await _is_open(identity, made.key)
    assert made.id in [key.id for key in await _keys(identity)]


async def test_no_token_outlives_its_key(identity: Any) -> None:
    made = await _create(identity, username="api", expires_in_days=1)
    soon = "UPDATE api_keys SET expires_at = now() + interval '5 seconds' WHERE id = CAST(:id AS uuid)"
    await _sql(identity, soon, id=made.id)
    use = await identity.store.find_key_use(_hash(made.key), None)
    assert use is not None
    assert use.seconds_left is not None
    assert 0 < use.seconds_left <= 5 < USER_TOKEN_SECONDS
    first, second = [await identity.check(x_api_key=made.key) for _ in range(2)]
    lives = [_life_seconds(response) for response in (first, second)]
    assert max(lives) <= 5


async def test_the_last_use_is_written_once_a_minute_and_reaches_the_list(identity: Any) -> None:
    made = await _create(identity, username="api")
    for _ in range(3):
        assert await _is_open(identity, made.key)
    query = "SELECT last_used_at, xmin FROM api_keys WHERE id = CAST(:id AS uuid)"
    while (await _sql(identity, query, id=made.id))[0][0] is None:  # noqa: ASYNC110 - the writer tells nobody
        await asyncio.sleep(0.01)
    before = await _sql(identity, query, id=made.id)
    identity.issued.forget()
    assert await _is_open(identity, made.key)
    store = identity.store
    await store.save_key_uses([key.id for key in await store.find_keys()])
    assert await _sql(identity, query, id=made.id) == before, "no second write within the minute"
    (shown,) = [key for key in await _keys(identity) if key.id == made.id]
    assert datetime.strptime(shown.last_used, TIME)


async def test_nobody_deletes_their_own_account(identity: Any) -> None:
    await identity.make_user("ann", ["train:all"])
    request = pb.DeleteUsersRequest(user_name_list=["ann", "api"])
    call = identity.stub.DeleteUsers(request, metadata=identity.admin)
    assert "api cannot delete their own account" in await fails(call, PRECONDITION)
    assert await identity.store.find_users("ann"), "nothing is deleted"


async def test_the_owner_of_the_key_of_a_request_is_not_deleted_with_it(identity: Any, user_token: Any) -> None:
    """An administrator of a WebUI acts through a key of `api`, without which nobody there could do anything."""
    await identity.make_user("boss", ALL)
    through_api = user_token("boss", ALL, ["chiefs"], key_owner="api")
    call = identity.stub.DeleteUsers(pb.DeleteUsersRequest(user_name_list=["api"]), metadata=through_api)
    assert "api owns the API key of this request" in await fails(call, PRECONDITION)
    assert await _is_open(identity, identity.first_key)


async def test_the_last_holder_of_user_all_keeps_it(identity: Any, user_token: Any) -> None:
    boss = user_token("boss", ALL, ["chiefs"])
    words = "at least one user must keep the permission user:all"
    call = identity.stub.DeleteUsers(pb.DeleteUsersRequest(user_name_list=["api"]), metadata=boss)
    assert await fails(call, PRECONDITION) == words
    demoted = pb.CreateUserRequest(username="api", password="x", roles=["poor"])
    role = pb.CreateRoleRequest(role_name="poor", permissions=["train:all"])
    await identity.stub.CreateRole(role, metadata=boss)
    assert await fails(identity.stub.CreateUser(demoted, metadata=boss), PRECONDITION) == words
    assert await _is_open(identity, identity.first_key), "nothing is deleted"

    await identity.make_user("boss", ALL)
    await identity.stub.DeleteUsers(pb.DeleteUsersRequest(user_name_list=["api"]), metadata=boss)
    stripped = pb.CreateRoleRequest(role_name="role of boss", permissions=["train:all"])
    assert await fails(identity.stub.CreateRole(stripped, metadata=boss), PRECONDITION) == words
    gone = pb.DeleteRolesRequest(role_name_list=["role of boss"])
    assert await fails(identity.stub.DeleteRoles(gone, metadata=boss), PRECONDITION) == words


async def test_two_administrators_who_remove_each_other_at_once_leave_one(identity: Any) -> None:
    store = identity.store
    await store.save_user(User(username="boss", roles=["IT Operator"], creator="api"))
    results = await asyncio.gather(*(store.remove_users([name]) for name in ("api", "boss")), return_exceptions=True)
    assert [type(result) for result in results if result is not None] == [LastAdministrator]
    assert issubclass(LastAdministrator, FailedPrecondition)
    assert len(await store.find_users()) == 1


def _hash(key: str) -> str:
    from services.identity.tokens import sha256

    return sha256(key)


def _life_seconds(response: Any) -> int:
    import jwt

    claims = jwt.decode(response.ok_response.headers[0].header.value, options={"verify_signature": False})
    return int(claims["exp"] - claims["iat"])
