"""API keys, the gateway's question, secrets and the tokens made of them."""

from collections.abc import Callable
from typing import Any
from uuid import uuid4

import grpc
import psycopg
import pytest
from sqlalchemy.engine import make_url

from esd.identity.v1 import identity_pb2 as pb
from esd.options.v1 import options_pb2 as options
from services.common.auth import Kind, Profile, UsernameStatus
from services.common.errors import Unauthenticated
from services.identity.keys import new_api_key
from tests.services.identity.conftest import ALL, GATEWAY_SECRET, MODELS_SECRET
from tests.serving import fails


async def test_a_key_acts_for_its_owner_when_nobody_is_named(identity: Any) -> None:
    caller = await identity.caller(identity.first_key)
    assert (caller.kind, caller.name, caller.key_owner) == (Kind.USER, "api", "api")
    assert (caller.username_status, caller.impersonate) == (UsernameStatus.ABSENT, True)
    assert (caller.roles, caller.permissions) == (["IT Operator"], sorted(ALL))


async def test_the_first_key_acts_for_whom_the_request_names(identity: Any) -> None:
    await identity.make_user("ann", ["train:all"])
    caller = await identity.caller(identity.first_key, Profile.WEBUI, username="ann")
    assert (caller.name, caller.key_owner, caller.profile) == ("ann", "api", Profile.WEBUI)
    assert (caller.username_status, caller.permissions) == (UsernameStatus.NAMED, ["train:all"])


@pytest.mark.parametrize("name", ["unheard of", "x" * 256])
async def test_an_unknown_user_passes_the_gateway_without_roles(identity: Any, name: str) -> None:
    caller = await identity.caller(identity.first_key, username=name)
    assert (caller.name, caller.username_status) == (name, UsernameStatus.UNKNOWN)
    assert not caller.roles
    assert not caller.permissions


@pytest.mark.parametrize("name", ["x" * 50_000, "\N{GRINNING FACE}" * 10_000])
async def test_a_name_that_nobody_can_have_travels_no_further_than_a_header_can(identity: Any, name: str) -> None:
    response = await identity.check(x_api_key=identity.first_key, username=name)
    assert len(response.ok_response.headers[0].header.value) < 8_000
    assert (await identity.caller(identity.first_key, username=name)).username_status == UsernameStatus.UNKNOWN


async def test_a_plain_key_acts_for_its_owner_only(identity: Any) -> None:
    key = await identity.make_user("ann", ["train:all"])
    assert (await identity.caller(key, username="ann")).username_status == UsernameStatus.NAMED
    for name in ("api", "unheard of"):
        caller = await identity.caller(key, username=name)
        assert (caller.username_status, caller.permissions) == (UsernameStatus.FOREIGN, [])
        assert caller.key_owner == "ann"


async def test_the_legacy_authorization_names_the_user_only_when_username_is_absent(identity: Any) -> None:
    await identity.make_user("ann", ["train:all"])
    bearer = "Bearer " + b"ann".hex().upper()
    assert (await identity.caller(identity.first_key, authorization=bearer)).name == "ann"
    assert (await identity.caller(identity.first_key, authorization=bearer, username="api")).name == "api"
    assert (await identity.caller(identity.first_key, authorization="Basic eA==")).name == "api"
    for undecodable in ("Bearer xyz", "Bearer", "Bearer ff"):
        status = (await identity.caller(identity.first_key, authorization=f"{undecodable} ")).username_status
        assert status == UsernameStatus.UNREADABLE


async def test_a_bad_key_is_forbidden(identity: Any) -> None:
    for headers in ({}, {"x_api_key": "x"}, {"x_api_key": new_api_key()}, {"x_api_key": "esd_" + "0" * 48}):
        response = await identity.check(**headers)
        assert (response.status.code, response.denied_response.status.code) == (7, 403)
        assert response.denied_response.body == "Forbidden"


async def test_what_the_gateway_must_add_and_remove(identity: Any) -> None:
    response = await identity.check(x_api_key=identity.first_key)
    (option,) = response.ok_response.headers
    assert (option.header.key, option.append_action) == ("x-esd-token", option.OVERWRITE_IF_EXISTS_OR_ADD)
    assert response.ok_response.headers_to_remove == ["x-api-key", "authorization", "username"]


@pytest.mark.parametrize("secret", ["", "wrong", MODELS_SECRET])
async def test_only_the_gateway_may_ask(identity: Any, secret: str) -> None:
    await fails(identity.check(secret=secret, x_api_key=identity.first_key), grpc.StatusCode.UNAUTHENTICATED)


async def test_a_token_is_kept_and_forgotten_when_a_role_changes_in_any_replica(start_replica: Any) -> None:
    one, other = await start_replica(), await start_replica()
    key = await one.make_user("ann", ["train:all"])
    first = await other.check(x_api_key=key)
    assert await other.check(x_api_key=key) == first
    request = pb.CreateRoleRequest(role_name="role of ann", permissions=["inference:all"])
    await one.stub.CreateRole(request, metadata=one.admin)
    assert (await one.caller(key)).permissions == ["inference:all"], "the same replica knows at once"
    while True:  # until the notification has arrived; notifications of earlier changes may come first
        other.notified.clear()
        if (await other.caller(key)).permissions == ["inference:all"]:
            break
        await other.notified.wait()


async def test_a_kept_token_needs_no_database_and_any_other_says_that_it_is_down(
    identity: Any, database_url: str, make_database: Callable[[], str]
) -> None:
    kept = await identity.check(x_api_key=identity.first_key)
    url, other_url = make_url(database_url), make_url(make_database()).set(drivername="postgresql")
    with psycopg.connect(other_url.render_as_string(hide_password=False), autocommit=True) as connection:
        connection.execute(f'ALTER DATABASE "{url.database}" ALLOW_CONNECTIONS false')
        try:
            ends = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = %s"
            connection.execute(ends, [url.database])
            assert await identity.check(x_api_key=identity.first_key) == kept
            details = await fails(
                identity.check(x_api_key=identity.first_key, username="x"), grpc.StatusCode.UNAVAILABLE
            )
            assert "database" in details
        finally:
            connection.execute(f'ALTER DATABASE "{url.database}" ALLOW_CONNECTIONS true')


async def test_a_key_is_shown_once_and_works(identity: Any) -> None:
    await identity.make_user("ann", ["train:all"])
    request = pb.CreateApiKeyRequest(username="ann", impersonate=True)
    response = await identity.stub.CreateApiKey(request, metadata=identity.admin)
    assert (response.username, response.impersonate, response.key[:4]) == ("ann", True, "esd_")
    caller = await identity.caller(response.key, username="api")
    assert (caller.name, caller.key_owner) == ("api", "ann")


async def test_a_key_is_for_an_existing_user_and_does_no_more_than_its_maker(identity: Any, user_token: Any) -> None:
    call = identity.stub.CreateApiKey(pb.CreateApiKeyRequest(username="x"), metadata=identity.admin)
    assert '"x" not exist' in await fails(call, grpc.StatusCode.INVALID_ARGUMENT)
    plain = user_token("bob", ALL)
    call = identity.stub.CreateApiKey(pb.CreateApiKeyRequest(username="api", impersonate=True), metadata=plain)
    assert "act for others" in await fails(call, grpc.StatusCode.PERMISSION_DENIED)
    lesser = user_token("bob", ["user:all"])
    call = identity.stub.CreateApiKey(pb.CreateApiKeyRequest(username="api"), metadata=lesser)
    assert "assign permission" in await fails(call, grpc.StatusCode.PERMISSION_DENIED)
    await identity.make_user("bob", ["user:all"])
    through_api = user_token("bob", ["user:all"], impersonate=True, key_owner="api")  # as who acts for bob
    call = identity.stub.CreateApiKey(pb.CreateApiKeyRequest(username="bob", impersonate=True), metadata=through_api)
    assert "assign permission" in await fails(call, grpc.StatusCode.PERMISSION_DENIED)


async def _issue(identity: Any, secret: str) -> pb.IssueTokenResponse:
    return await identity.stub.IssueToken(pb.IssueTokenRequest(secret=secret))


async def test_a_service_trades_its_secret_for_a_token_of_five_minutes(identity: Any) -> None:
    response = await _issue(identity, MODELS_SECRET)
    caller = identity.tokens.verifier().verify(response.token)
    assert (caller.kind, caller.name, response.lifetime_seconds) == (Kind.SERVICE, "models", 300)


async def test_unknown_secrets_and_the_gateways_get_no_token(identity: Any) -> None:
    for secret in ("x", GATEWAY_SECRET):
        await fails(_issue(identity, secret), grpc.StatusCode.UNAUTHENTICATED)


@pytest.mark.parametrize(
    ("caller", "kind", "audience"),
    [
        (options.CALLER_WORKER, Kind.WORKER, "inference"),
        (options.CALLER_TRAINER, Kind.TRAINER, "training"),
    ],
)
async def test_a_workers_secret_opens_one_service_until_it_is_replaced_or_deleted(
    identity: Any, service_token: Any, caller: Any, kind: Kind, audience: str
) -> None:
    endpoints, subject = service_token("endpoints"), str(uuid4())
    create = pb.CreateSecretRequest(caller=caller, subject=subject)
    first = (await identity.stub.CreateSecret(create, metadata=endpoints)).secret
    token = (await _issue(identity, first)).token
    seen = identity.tokens.verifier(audience).verify(token)
    assert (seen.kind, seen.name) == (kind, subject)
    with pytest.raises(Unauthenticated):
        identity.tokens.verifier("elsewhere").verify(token)

    second = (await identity.stub.CreateSecret(create, metadata=endpoints)).secret
    await fails(_issue(identity, first), grpc.StatusCode.UNAUTHENTICATED)
    delete = pb.DeleteSecretRequest(caller=caller, subject=subject)
    for _ in range(2):
        await identity.stub.DeleteSecret(delete, metadata=endpoints)
    await fails(_issue(identity, second), grpc.StatusCode.UNAUTHENTICATED)


async def test_secrets_are_made_only_for_the_service_that_starts_such_processes(
    identity: Any, service_token: Any, user_token: Any
) -> None:
    worker = pb.CreateSecretRequest(caller=options.CALLER_WORKER, subject=str(uuid4()))
    trainer = pb.CreateSecretRequest(caller=options.CALLER_TRAINER, subject=str(uuid4()))
    denied = grpc.StatusCode.PERMISSION_DENIED
    assert (await identity.stub.CreateSecret(trainer, metadata=service_token("endpoints"))).secret
    for other in ("training", "inference"):
        await fails(identity.stub.CreateSecret(worker, metadata=service_token(other)), denied)
        await fails(identity.stub.CreateSecret(trainer, metadata=service_token(other)), denied)
    await fails(identity.stub.CreateSecret(worker, metadata=user_token("api", ALL)), denied)
    service = pb.CreateSecretRequest(caller=options.CALLER_SERVICE, subject=str(uuid4()))
    await fails(
        identity.stub.CreateSecret(service, metadata=service_token("endpoints")), grpc.StatusCode.INVALID_ARGUMENT
    )


async def test_another_service_learns_a_users_roles_and_permissions(identity: Any, service_token: Any) -> None:
    await identity.make_user("ann", ["train:all", "inference:all"])
    user = await identity.stub.GetUser(pb.GetUserRequest(username="ann"), metadata=service_token("models"))
    assert (user.username, list(user.roles)) == ("ann", ["role of ann"])
    assert list(user.permissions) == ["inference:all", "train:all"]
    for name in ("x", ""):
        call = identity.stub.GetUser(pb.GetUserRequest(username=name), metadata=service_token("models"))
        await fails(call, grpc.StatusCode.NOT_FOUND)
