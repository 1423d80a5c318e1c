"""The audit of users, roles, keys and secrets: a row for each change, none for what fails, and no secret in any."""

from contextlib import suppress
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from sqlalchemy.exc import ProgrammingError

from esd.identity.v1 import identity_pb2 as pb
from esd.options.v1 import options_pb2 as options
from services.identity.rows import User
from tests.auditing import Trail, through_gateway

ENDPOINT = "00000000-0000-4000-8000-000000000001"


async def test_each_change_writes_one_row_that_says_who_what_and_from_where(identity: Any, user_token: Any) -> None:
    trail = await Trail.begin(identity.database)
    boss = through_gateway(user_token("boss", [f"{r}:all" for r in ("user", "role", "train")], key_owner="api"))

    async def change(rpc: Any, request: Any) -> Any:
        response = await rpc(request, metadata=boss)
        await trail.new()
        (row,) = trail.rows
        who = {name: row[name] for name in ("kind", "actor", "key_owner", "address", "request_id")}
        assert who == {
            "kind": "user",
            "actor": "boss",
            "key_owner": "api",
            "address": "192.0.2.7",
            "request_id": "request-1",
        }
        return response, (row["action"], row["target"]), row["changes"]

    stub = identity.stub
    role = pb.CreateRoleRequest(role_name="draw", permissions=["train:list"])
    _, what, changes = await change(stub.CreateRole, role)
    assert what == ("role.create", "draw")
    assert changes == {"creator": {"to": "boss"}, "permissions": {"to": ["train:list"]}}
    role.permissions[:] = ["train:all"]
    _, what, changes = await change(stub.CreateRole, role)
    assert what == ("role.update", "draw")
    assert changes == {"permissions": {"from": ["train:list"], "to": ["train:all"]}}

    user = pb.CreateUserRequest(username="ann", password="hidden-password", roles=["draw"])
    _, what, changes = await change(stub.CreateUser, user)
    assert what == ("user.create", "ann")
    assert changes == {"creator": {"to": "boss"}, "roles": {"to": ["draw"]}, "password": {"to": "********"}}
    _, what, changes = await change(stub.CreateUser, user)
    assert (what, changes) == (("user.update", "ann"), {"password": {"to": "********"}})

    made, what, changes = await change(stub.CreateApiKey, pb.CreateApiKeyRequest(username="ann", expires_in_days=1))
    assert what == ("key.create", made.id)
    shown = {"owner": "ann", "prefix": made.prefix, "impersonate": False, "expires": made.expires}
    assert changes == {name: {"to": value} for name, value in shown.items()}
    _, what, changes = await change(stub.DeleteApiKeys, pb.DeleteApiKeysRequest(key_id_list=[made.id]))
    assert (what, changes["owner"]) == (("key.revoke", made.id), {"from": "ann"})

    kept = (await stub.CreateApiKey(pb.CreateApiKeyRequest(username="ann"), metadata=boss)).id
    await trail.new()
    _, what, changes = await change(stub.DeleteRoles, pb.DeleteRolesRequest(role_name_list=["draw", "unknown"]))
    assert (what, changes["holders"]) == (("role.delete", "draw"), {"from": ["ann"]})
    _, what, changes = await change(stub.DeleteUsers, pb.DeleteUsersRequest(user_name_list=["ann", "unknown"]))
    assert (what, changes["keys"]) == (("user.delete", "ann"), {"from": [kept]})

    text = await trail.text()
    for secret in ("hidden-password", made.key, made.key[12:], "argon2", identity.first_key):
        assert secret not in text


async def test_the_secrets_of_workers_are_audited_and_not_shown(identity: Any, service_token: Any) -> None:
    trail = await Trail.begin(identity.database)
    endpoints = service_token("endpoints")
    create = pb.CreateSecretRequest(caller=options.CALLER_WORKER, subject=ENDPOINT)
    delete = pb.DeleteSecretRequest(caller=options.CALLER_WORKER, subject=ENDPOINT)
    secret = (await identity.stub.CreateSecret(create, metadata=endpoints)).secret
    await identity.stub.DeleteSecret(delete, metadata=endpoints)
    await identity.stub.DeleteSecret(delete, metadata=endpoints)
    target = f"worker/{ENDPOINT}"
    assert await trail.new() == [("secret.create", target), ("secret.delete", target)]
    assert [(row["kind"], row["actor"], row["address"]) for row in trail.rows] == [
        ("service", "endpoints", "127.0.0.1")
    ] * 2
    assert secret not in await trail.text()


async def test_a_change_that_fails_or_changes_nothing_writes_no_row(identity: Any, user_token: Any) -> None:
    role = pb.CreateRoleRequest(role_name="draw", permissions=["train:all"])
    await identity.stub.CreateRole(role, metadata=identity.admin)
    nobody, creator = user_token("eve", []), user_token("eve", ["role:create", "train:all"])
    trail = await Trail.begin(identity.database)
    stub, api = identity.stub, identity.admin
    calls = [
        (stub.CreateRole, role, api),
        (stub.CreateRole, role, creator),
        (stub.CreateRole, pb.CreateRoleRequest(role_name="x", permissions=["made:up"]), api),
        (stub.CreateRole, pb.CreateRoleRequest(role_name="x", permissions=["train:all"]), nobody),
        (stub.DeleteRoles, pb.DeleteRolesRequest(role_name_list=["draw", "IT Operator"]), api),
        (stub.DeleteRoles, pb.DeleteRolesRequest(role_name_list=["unknown"]), api),
        (stub.CreateUser, pb.CreateUserRequest(username="x", password="x", roles=["unknown"]), api),
        (stub.CreateUser, pb.CreateUserRequest(username="api", password="x", roles=["draw"]), api),
        (stub.DeleteUsers, pb.DeleteUsersRequest(user_name_list=["api"]), api),
        (stub.DeleteUsers, pb.DeleteUsersRequest(user_name_list=["api"]), user_token("boss", ["user:all"])),
        (stub.CreateApiKey, pb.CreateApiKeyRequest(username="unknown"), api),
        (stub.DeleteApiKeys, pb.DeleteApiKeysRequest(key_id_list=[ENDPOINT]), api),
    ]
    for rpc, request, metadata in calls:
        with suppress(grpc.aio.AioRpcError):
            await rpc(request, metadata=metadata)
    assert await trail.new() == []


async def test_what_the_first_start_makes_is_audited_as_the_services_own_doing(
    identity: Any, start_replica: Any
) -> None:
    await start_replica()
    trail = Trail(identity.database, 0, [])
    made = [action for action, _ in await trail.new()]
    assert made == ["role.create", "role.create", "user.create", "key.create"]
    assert {(row["kind"], row["actor"]) for row in trail.rows} == {("service", "identity")}


async def test_a_row_that_cannot_be_written_undoes_the_change(identity: Any) -> None:
    async with identity.database.transaction() as session:
        await session.execute(sa.text("ALTER TABLE audit RENAME TO gone"))
    with pytest.raises(ProgrammingError):
        await identity.store.save_user(User(username="ann", roles=[], creator="api"))
    assert await identity.store.find_users("ann") == []
