"""Speaks the identity service's protos."""

from __future__ import annotations

from typing import Any

import grpc

from esd.identity.v1 import identity_pb2 as pb
from esd.identity.v1 import identity_pb2_grpc as rpc
from esd.options.v1 import options_pb2 as options
from services.common.auth import Caller, current_caller, enforce
from services.common.errors import InvalidArgument
from services.common.structs import json_value, list_value
from services.common.times import time_text
from services.identity.domain import ADMINISTRATORS, DEFAULT_ROLES, Actor, Identity, UserView
from services.identity.rows import ApiKey, Role
from services.identity.tokens import SECRET_TOKEN_SECONDS, Tokens

Context = grpc.aio.ServicerContext[Any, Any]

_SECRET_KINDS = {options.CALLER_WORKER: "worker", options.CALLER_TRAINER: "trainer"}
_NOT_APPLICABLE = "not_applicable"
_HIDDEN = "********"


class IdentityServicer(rpc.IdentityServiceServicer):
    """Parses, calls the domain, replies."""

    def __init__(self, identity: Identity, tokens: Tokens, allow_initial_users: bool = True) -> None:
        self._identity = identity
        self._allow_initial_users = allow_initial_users
        self._tokens = tokens

    async def Ping(self, request: pb.PingRequest, context: Context) -> pb.PingResponse:
        return pb.PingResponse()

    async def ListRoles(self, request: pb.ListRolesRequest, context: Context) -> pb.ListRolesResponse:
        roles = await self._identity.list_roles(_actor(), request.role or None)
        return pb.ListRolesResponse(
            roles=[_role(role) for role in roles],
            previous_evaluated_key=_NOT_APPLICABLE,
            last_evaluated_key=json_value(None),
        )

    async def CreateRole(self, request: pb.CreateRoleRequest, context: Context) -> pb.CreateRoleResponse:
        await self._identity.create_role(_actor(), request.role_name, list(request.permissions))
        return pb.CreateRoleResponse()

    async def DeleteRoles(self, request: pb.DeleteRolesRequest, context: Context) -> pb.DeleteRolesResponse:
        await self._identity.delete_roles(list(request.role_name_list))
        return pb.DeleteRolesResponse()

    async def ListUsers(self, request: pb.ListUsersRequest, context: Context) -> pb.ListUsersResponse:
        reveal = current_caller().is_webui and request.show_password.lower() in ("true", "1", "yes")
        users = await self._identity.list_users(_actor(), request.username or None, reveal)
        return pb.ListUsersResponse(
            users=[_user(user) for user in users],
            previous_evaluated_key=_NOT_APPLICABLE,
            last_evaluated_key=_NOT_APPLICABLE,
        )

    async def CreateUser(self, request: pb.CreateUserRequest, context: Context) -> pb.CreateUserResponse:
        if not request.initial and not request.roles:
            raise InvalidArgument('[object has missing required properties (["roles"])]')
        caller = current_caller()
        is_first_of_webui = self._allow_initial_users and request.initial and caller.is_webui and caller.impersonate
        if not is_first_of_webui:
            enforce()
        if not request.initial:
            await self._identity.create_user(_actor(), request.username, request.password, list(request.roles))
            return pb.CreateUserResponse()
        actor = None if is_first_of_webui else _actor()
        await self._identity.create_administrator(actor, request.username, request.password)
        return _initial_user(request.username)

    async def DeleteUsers(self, request: pb.DeleteUsersRequest, context: Context) -> pb.DeleteUsersResponse:
        await self._identity.delete_users(_actor(), list(request.user_name_list))
        return pb.DeleteUsersResponse()

    async def CreateApiKey(self, request: pb.CreateApiKeyRequest, context: Context) -> pb.CreateApiKeyResponse:
        days = request.expires_in_days if request.HasField("expires_in_days") else None
        new = await self._identity.create_key(_actor(), request.username, request.impersonate, days)
        return pb.CreateApiKeyResponse(
            id=str(new.key.id),
            username=new.key.owner,
            key=new.value,
            impersonate=new.key.impersonate,
            prefix=new.key.prefix,
            created=time_text(new.key.created_at),
            expires=time_text(new.key.expires_at),
        )

    async def ListApiKeys(self, request: pb.ListApiKeysRequest, context: Context) -> pb.ListApiKeysResponse:
        return pb.ListApiKeysResponse(
            keys=[_key(key) for key in await self._identity.list_keys(request.username or None)]
        )

    async def DeleteApiKeys(self, request: pb.DeleteApiKeysRequest, context: Context) -> pb.DeleteApiKeysResponse:
        await self._identity.delete_keys(list(request.key_id_list))
        return pb.DeleteApiKeysResponse()

    async def IssueToken(self, request: pb.IssueTokenRequest, context: Context) -> pb.IssueTokenResponse:
        token = await self._tokens.of_secret(request.secret)
        return pb.IssueTokenResponse(token=token, lifetime_seconds=SECRET_TOKEN_SECONDS)

    async def CreateSecret(self, request: pb.CreateSecretRequest, context: Context) -> pb.CreateSecretResponse:
        service, kind = current_caller().name, _SECRET_KINDS[request.caller]
        return pb.CreateSecretResponse(secret=await self._identity.create_secret(service, kind, request.subject))

    async def DeleteSecret(self, request: pb.DeleteSecretRequest, context: Context) -> pb.DeleteSecretResponse:
        service, kind = current_caller().name, _SECRET_KINDS[request.caller]
        await self._identity.delete_secret(service, kind, request.subject)
        return pb.DeleteSecretResponse()

    async def ReviewTokens(self, request: pb.ReviewTokensRequest, context: Context) -> pb.ReviewTokensResponse:
        return pb.ReviewTokensResponse(holds=[await self._tokens.holds(token) for token in request.tokens])

    async def GetUser(self, request: pb.GetUserRequest, context: Context) -> pb.GetUserResponse:
        user = await self._identity.get_user(request.username)
        return pb.GetUserResponse(username=user.username, roles=user.roles, permissions=user.permissions)


def _actor() -> Actor:
    caller: Caller = current_caller()
    return Actor(caller.name, caller.permissions, caller.roles, caller.impersonate, caller.key_owner)


def _role(role: Role) -> pb.Role:
    return pb.Role(role_name=role.role_name, creator=role.creator, permissions=role.permissions)


def _user(user: UserView) -> pb.User:
    """NOTE: the original showed `*` for no password to a client that asked for passwords and took that for one."""
    marked = "*" if current_caller().is_webui and not user.has_password else _HIDDEN
    return pb.User(
        username=user.username,
        roles=user.roles,
        creator=user.creator,
        permissions=user.permissions,
        password=user.password or marked,
    )


def _key(key: ApiKey) -> pb.ApiKey:
    return pb.ApiKey(
        id=str(key.id),
        username=key.owner,
        prefix=key.prefix,
        impersonate=key.impersonate,
        created=time_text(key.created_at),
        last_used=time_text(key.last_used_at),
        expires=time_text(key.expires_at),
    )


def _initial_user(username: str) -> pb.CreateUserResponse:
    user = pb.CreateUserResponse.InitialUser(username=username, roles=[ADMINISTRATORS])
    return pb.CreateUserResponse(user=user, all_roles=list_value(DEFAULT_ROLES))
