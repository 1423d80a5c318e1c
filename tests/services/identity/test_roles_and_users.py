"""Roles and users, as contract 3 has them."""

import json
import traceback
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from cryptography.fernet import Fernet
from google.protobuf.json_format import MessageToDict
from structlog.testing import capture_logs

from esd.identity.v1 import identity_pb2 as pb
from esd.identity.v1 import identity_pb2_grpc
from services.common.auth import Profile, UsernameStatus
from services.identity.servicer import IdentityServicer
from tests.serving import fails

ALL = ["train:all", "checkpoint:all", "inference:all", "sagemaker_endpoint:all", "user:all", "role:all"]
INVALID, PRECONDITION, DENIED = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.PERMISSION_DENIED,
)
UNAUTHENTICATED, INTERNAL = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INTERNAL


def _role(name: str, permissions: list[str]) -> pb.CreateRoleRequest:
    return pb.CreateRoleRequest(role_name=name, permissions=permissions)


def _user(name: str, roles: list[str], **more: Any) -> pb.CreateUserRequest:
    return pb.CreateUserRequest(username=name, password="päss word", roles=roles, **more)


async def _role_names(identity: Any, metadata: Any) -> list[str]:
    return [role.role_name for role in (await identity.stub.ListRoles(pb.ListRolesRequest(), metadata=metadata)).roles]


async def _user_named(identity: Any, name: str, metadata: Any = None, **more: str) -> pb.User:
    request = pb.ListUsersRequest(username=name, **more)
    (user,) = (await identity.stub.ListUsers(request, metadata=metadata or identity.admin)).users
    return user


async def test_anybody_with_a_key_is_answered_pong(identity: Any, user_token: Any) -> None:
    nobody = user_token("x", username_status=UsernameStatus.UNKNOWN, profile=Profile.WEBUI)
    call = identity.stub.Ping(pb.PingRequest(), metadata=nobody)
    assert dict(await call.initial_metadata())["x-esd-message"] == "pong"


async def test_the_first_start_makes_the_default_roles_and_the_user_api(identity: Any) -> None:
    listed = await identity.stub.ListRoles(pb.ListRolesRequest(), metadata=identity.admin)
    assert MessageToDict(listed) == {
        "roles": [{"role_name": name, "creator": "ESD", "permissions": ALL} for name in ("byoc", "IT Operator")],
        "previous_evaluated_key": "not_applicable",
        "last_evaluated_key": None,
    }
    users = await identity.stub.ListUsers(pb.ListUsersRequest(), metadata=identity.admin)
    assert MessageToDict(users) == {
        "users": [
            {
                "username": "api",
                "roles": ["IT Operator"],
                "creator": "ESD",
                "permissions": sorted(ALL),
                "password": "********",
            }
        ],
        "previous_evaluated_key": "not_applicable",
        "last_evaluated_key": "not_applicable",
    }


async def test_a_role_is_created_replaced_and_listed_in_the_order_given(identity: Any, user_token: Any) -> None:
    call = identity.stub.CreateRole(_role("Painter", ["train:all", "checkpoint:list"]), metadata=identity.admin)
    metadata = dict(await call.initial_metadata())
    assert (metadata["x-esd-status"], metadata["x-esd-message"]) == ("201", "role created")
    again = _role("Painter", ["inference:all", "checkpoint:all", "inference:all"])
    await identity.stub.CreateRole(again, metadata=user_token("bob", ["role:all"]))
    (role,) = (await identity.stub.ListRoles(pb.ListRolesRequest(role="Painter"), metadata=identity.admin)).roles
    assert (role.creator, list(role.permissions)) == ("bob", ["inference:all", "checkpoint:all"])
    assert await _role_names(identity, identity.admin) == ["byoc", "Painter", "IT Operator"]
    assert not (await identity.stub.ListRoles(pb.ListRolesRequest(role="None"), metadata=identity.admin)).roles


async def test_who_may_only_list_roles_sees_their_own_and_those_they_hold(identity: Any, user_token: Any) -> None:
    for name, creator in (("a", "ann"), ("b", "bob"), ("c", "bob")):
        await identity.stub.CreateRole(_role(name, ["train:all"]), metadata=user_token(creator, ["role:all"]))
    assert await _role_names(identity, user_token("ann", ["role:list"], ["c"])) == ["c", "a"]
    details = await fails(
        identity.stub.ListRoles(pb.ListRolesRequest(), metadata=user_token("ann", ["role:create"])), DENIED
    )
    assert details == "User ann has no permissions: ['role:all', 'role:list']"


async def test_an_unknown_permission_is_refused_by_name(identity: Any) -> None:
    for permission in ("train", "train:delete", "x:all"):
        call = identity.stub.CreateRole(_role("r", ["train:all", permission]), metadata=identity.admin)
        assert f'"{permission}" is not known' in await fails(call, INVALID)
    assert "r" not in await _role_names(identity, identity.admin)


async def test_the_administrators_role_cannot_be_stripped_or_deleted(identity: Any) -> None:
    call = identity.stub.CreateRole(_role("IT Operator", ALL[:5]), metadata=identity.admin)
    assert "cannot lose permissions: role:all" in await fails(call, PRECONDITION)
    await identity.stub.CreateRole(_role("IT Operator", [*ALL, "train:list"]), metadata=identity.admin)
    request = pb.DeleteRolesRequest(role_name_list=["byoc", "IT Operator"])
    details = await fails(identity.stub.DeleteRoles(request, metadata=identity.admin), INVALID)
    assert details == "cannot delete default role"
    assert await _role_names(identity, identity.admin) == ["byoc", "IT Operator"]


async def test_who_may_only_create_roles_touches_no_others_and_grants_no_more_than_they_hold(
    identity: Any, user_token: Any
) -> None:
    ann = user_token("ann", ["role:create", "train:all"])
    await identity.stub.CreateRole(_role("mine", ["train:all"]), metadata=ann)
    await identity.stub.CreateRole(_role("mine", ["train:list"]), metadata=ann)
    details = await fails(identity.stub.CreateRole(_role("byoc", ["train:all"]), metadata=ann), PRECONDITION)
    assert details == "creator ann not have permission to update role byoc"
    call = identity.stub.CreateRole(_role("more", ["train:all", "user:all"]), metadata=ann)
    details = await fails(call, PRECONDITION)
    assert details == "creator ann have not permission to create role with permission: [user:all]"


async def test_deleted_roles_are_taken_from_their_holders(identity: Any) -> None:
    for name in ("one", "two", "three"):
        await identity.stub.CreateRole(_role(name, ["train:all"]), metadata=identity.admin)
    await identity.stub.CreateUser(_user("ann", ["three", "two", "one"]), metadata=identity.admin)
    request = pb.DeleteRolesRequest(role_name_list=["two", "two", "unheard of"])
    call = identity.stub.DeleteRoles(request, metadata=identity.admin)
    assert dict(await call.initial_metadata())["x-esd-message"] == "roles deleted"
    assert (await _user_named(identity, "ann")).roles == ["three", "one"]
    assert "two" not in await _role_names(identity, identity.admin)


async def test_a_user_is_created_and_replaced(identity: Any) -> None:
    await identity.stub.CreateRole(_role("r", ["train:all", "inference:all"]), metadata=identity.admin)
    call = identity.stub.CreateUser(_user("ann", ["r"], creator="somebody else"), metadata=identity.admin)
    assert MessageToDict(await call) == {}
    metadata = dict(await call.initial_metadata())
    assert (metadata["x-esd-status"], metadata["x-esd-message"]) == ("201", "Created")
    user = await _user_named(identity, "ann")
    assert (user.creator, user.password) == ("api", "********")
    assert list(user.permissions) == ["inference:all", "train:all"]
    await identity.stub.CreateUser(_user("ann", ["byoc", "byoc"]), metadata=identity.admin)
    assert (await _user_named(identity, "ann")).roles == ["byoc"]


async def test_a_user_gets_only_roles_that_exist_and_that_the_creator_covers(identity: Any, user_token: Any) -> None:
    details = await fails(identity.stub.CreateUser(_user("ann", ["byoc", "x"]), metadata=identity.admin), INVALID)
    assert details == 'user roles "x" not exist'
    lesser = user_token("bob", ["user:all", "train:all"])
    details = await fails(identity.stub.CreateUser(_user("ann", ["byoc"]), metadata=lesser), DENIED)
    assert details == "creator has no permission to assign permission [checkpoint:all] to others"
    details = await fails(identity.stub.CreateUser(_user("ann", ["byoc"]), metadata=user_token("bob")), DENIED)
    assert details == "User bob has no permissions: ['user:all']"


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (pb.CreateUserRequest(roles=["byoc"]), '[object has missing required properties (["password","username"])]'),
        (pb.CreateUserRequest(username="a", password="b"), '[object has missing required properties (["roles"])]'),
        (_user("a", ["byoc"] * 21), "must have at most 20 elements but instance has 21 elements"),
        (_user("x" * 256, ["byoc"]), "is too long (length: 256 bytes, maximum allowed: 255)"),
        (_user("a\0b", ["byoc"]), "contains the character NUL"),
    ],
)
async def test_a_bad_user_is_refused_by_field(identity: Any, request_: pb.CreateUserRequest, sentence: str) -> None:
    assert sentence in await fails(identity.stub.CreateUser(request_, metadata=identity.admin), INVALID)


async def test_missing_roles_are_a_bad_body_before_they_are_a_bad_user(identity: Any, user_token: Any) -> None:
    nobody = user_token("x", username_status=UsernameStatus.UNKNOWN)
    await fails(identity.stub.CreateUser(_user("a", []), metadata=nobody), INVALID)
    await fails(identity.stub.CreateUser(_user("a", ["r"]), metadata=nobody), grpc.StatusCode.UNAUTHENTICATED)


@pytest.mark.parametrize("name", ["x" * 256, "ü" * 128, "a\0b"])
async def test_impossible_names_in_filters_and_lists_are_refused(identity: Any, name: str) -> None:
    calls = [
        identity.stub.ListRoles(pb.ListRolesRequest(role=name), metadata=identity.admin),
        identity.stub.ListUsers(pb.ListUsersRequest(username=name), metadata=identity.admin),
        identity.stub.CreateRole(_role(name, ["train:all"]), metadata=identity.admin),
        identity.stub.DeleteRoles(pb.DeleteRolesRequest(role_name_list=[name]), metadata=identity.admin),
        identity.stub.DeleteUsers(pb.DeleteUsersRequest(user_name_list=[name]), metadata=identity.admin),
        identity.stub.CreateApiKey(pb.CreateApiKeyRequest(username=name), metadata=identity.admin),
    ]
    for call in calls:
        await fails(call, INVALID)


async def test_users_are_listed_by_name_descending_and_only_as_far_as_one_may_see(
    identity: Any, user_token: Any
) -> None:
    for name, creator in (("ann", "api"), ("bob", "ann"), ("Zoe", "api")):
        await identity.stub.CreateUser(_user(name, ["byoc"]), metadata=user_token(creator, ALL))
    listed = await identity.stub.ListUsers(pb.ListUsersRequest(), metadata=identity.admin)
    assert [user.username for user in listed.users] == ["bob", "api", "ann", "Zoe"]
    listed = await identity.stub.ListUsers(pb.ListUsersRequest(), metadata=user_token("ann", ["user:list"]))
    assert [user.username for user in listed.users] == ["bob", "ann"]
    assert not (await identity.stub.ListUsers(pb.ListUsersRequest(username="x"), metadata=identity.admin)).users


async def test_passwords_are_shown_in_the_webui_profile_only_and_only_when_asked_for(
    identity: Any, user_token: Any
) -> None:
    await identity.stub.CreateUser(_user("ann", ["byoc"]), metadata=identity.admin)
    webui = user_token("api", ALL, profile=Profile.WEBUI)
    assert (await _user_named(identity, "ann", show_password="True")).password == "********"
    assert (await _user_named(identity, "ann", webui, show_password="True")).password == "päss word"
    assert (await _user_named(identity, "ann", webui, show_password="False")).password == "********"
    for name, without in (("ann", "********"), ("api", "*")):
        assert (await _user_named(identity, name, webui)).password == without
        assert (await _user_named(identity, name, show_password="True")).password == "********"


async def test_nobody_logs_in_with_what_is_shown_of_a_password_that_is_not_there(
    identity: Any, user_token: Any
) -> None:
    webui = user_token("api", ALL, profile=Profile.WEBUI)
    await identity.stub.CreateUser(_user("ann", ["byoc"]), metadata=identity.admin)
    async with identity.database.transaction() as session:  # by another key than today's
        lost = Fernet(Fernet.generate_key()).encrypt(b"x").decode()
        await session.execute(sa.text("UPDATE users SET password_encrypted = :lost"), {"lost": lost})
    for name in ("api", "ann"):
        shown = {(await _user_named(identity, name, webui, show_password="yes")).password for _ in range(3)}
        assert len(shown) == 3
        assert min(map(len, shown)) >= 40


async def test_deleted_users_are_gone_and_unknown_ones_skipped(identity: Any) -> None:
    key = await identity.make_user("ann", ["train:all"])
    request = pb.DeleteUsersRequest(user_name_list=["ann", "unheard of"])
    call = identity.stub.DeleteUsers(request, metadata=identity.admin)
    assert dict(await call.initial_metadata())["x-esd-message"] == "Users Deleted"
    assert (await identity.check(x_api_key=key)).denied_response.body == "Forbidden"


async def test_the_webui_client_makes_its_first_administrator_with_an_impersonating_key(
    identity: Any, user_token: Any
) -> None:
    await identity.stub.CreateUser(_user("ann", ["byoc"]), metadata=identity.admin)
    absent = user_token("api", profile=Profile.WEBUI, username_status=UsernameStatus.ABSENT, impersonate=True)
    response = await identity.stub.CreateUser(_user("ann", ["whatever"], initial=True), metadata=absent)
    assert MessageToDict(response) == {
        "user": {"username": "ann", "roles": ["IT Operator"]},
        "all_roles": ["IT Operator", "byoc"],
    }
    user = await _user_named(identity, "ann")
    assert (user.creator, list(user.roles)) == ("ESD", ["IT Operator"])
    assert (await identity.caller(identity.first_key)).name == "api", "the first key still works"


async def test_the_webui_clients_way_to_administrators_can_be_closed(
    identity: Any, user_token: Any, serve: Any
) -> None:
    servicer = IdentityServicer(identity.domain, identity.issued, allow_initial_users=False)
    channel = await serve(lambda server: identity_pb2_grpc.add_IdentityServiceServicer_to_server(servicer, server))
    stub: Any = identity_pb2_grpc.IdentityServiceStub(channel)
    initial = _user("eve", [], initial=True)
    absent = user_token("api", profile=Profile.WEBUI, username_status=UsernameStatus.ABSENT, impersonate=True)
    assert await fails(stub.CreateUser(initial, metadata=absent), UNAUTHENTICATED) == "Unauthorized"
    lesser = user_token("api", ["train:all"], profile=Profile.WEBUI, impersonate=True)
    assert "['user:all']" in await fails(stub.CreateUser(initial, metadata=lesser), DENIED)
    boss = user_token("api", ALL, profile=Profile.WEBUI, impersonate=True)
    assert (await stub.CreateUser(initial, metadata=boss)).user.username == "eve"


async def test_no_password_and_no_key_is_ever_logged(identity: Any, user_token: Any) -> None:
    webui = user_token("api", ALL, profile=Profile.WEBUI)
    with capture_logs() as logs:
        await identity.stub.CreateUser(_user("ann", ["byoc"]), metadata=identity.admin)
        await _user_named(identity, "ann", webui, show_password="True")
        key = (await identity.stub.CreateApiKey(pb.CreateApiKeyRequest(username="ann"), metadata=identity.admin)).key
        await identity.check(x_api_key=key)
        async with identity.database.transaction() as session:
            await session.execute(sa.text("ALTER TABLE users RENAME TO gone"))
        await fails(identity.stub.CreateUser(_user("ann", ["byoc"]), metadata=identity.admin), INTERNAL)
    failed = next(entry["exc_info"] for entry in logs if entry["event"] == "rpc failed")
    text = str(logs) + "".join(traceback.format_exception(failed))
    assert "UndefinedTable" in text
    for secret in ("päss word", key, "argon2", "gAAAA"):
        assert secret not in text


async def test_nobody_else_makes_an_administrator_without_the_permission(identity: Any, user_token: Any) -> None:
    initial = _user("eve", [], initial=True)
    document = user_token("eve", impersonate=True)
    assert "['user:all']" in await fails(identity.stub.CreateUser(initial, metadata=document), DENIED)
    plain_key = user_token("eve", profile=Profile.WEBUI)
    assert "['user:all']" in await fails(identity.stub.CreateUser(initial, metadata=plain_key), DENIED)
    lesser = user_token("eve", ["user:all"])
    assert "assign permission" in await fails(identity.stub.CreateUser(initial, metadata=lesser), DENIED)
    assert (await identity.stub.CreateUser(initial, metadata=identity.admin)).user.username == "eve"


async def test_json_names_are_those_of_the_contract() -> None:
    message = pb.ListRolesResponse(roles=[pb.Role(role_name="r")], last_evaluated_key={"null_value": 0})
    assert json.loads(json.dumps(MessageToDict(message)))["roles"][0] == {"role_name": "r"}
