"""What identity tells other services of users."""

from __future__ import annotations

from dataclasses import dataclass

import grpc

from esd.identity.v1 import identity_pb2, identity_pb2_grpc
from services.common.errors import InvalidArgument, NotFound
from services.common.rpc_errors import answer

_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True)
class User:
    """A user as identity knows them."""

    username: str
    roles: list[str]
    permissions: list[str]


class Users:
    """Asks the identity service."""

    def __init__(self, identity: grpc.aio.Channel) -> None:
        self._stub = identity_pb2_grpc.IdentityServiceStub(identity)

    async def find_user(self, username: str) -> User | None:
        """The user, or None when there is no such one.

        Raises:
            Unavailable: identity does not answer.
        """
        request = identity_pb2.GetUserRequest(username=username)
        try:
            found = await answer(self._stub.GetUser(request, timeout=_TIMEOUT_SECONDS), "identity")
        except NotFound:
            return None
        return User(found.username, list(found.roles), list(found.permissions))

    async def get_user(self, username: str) -> User:
        """The user whom a request names.

        Raises:
            InvalidArgument: there is no such one. Unavailable: identity does not answer.
        """
        user = await self.find_user(username)
        if user is None:
            raise InvalidArgument(f'user: "{username}" not exist')
        return user
