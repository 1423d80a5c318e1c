"""The services that inference asks: endpoints for pools, models for files, identity for users."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any
from uuid import UUID

import grpc

from esd.endpoints.v1 import endpoints_pb2, endpoints_pb2_grpc
from esd.models.v1 import models_pb2, models_pb2_grpc
from services.common.rpc_errors import answer
from services.common.users import Users
from services.common.viewer import Viewer

_TIMEOUT_SECONDS = 10


@dataclass(frozen=True)
class Endpoint:
    """A pool that can run jobs."""

    id: UUID
    name: str
    status: str
    instance_type: str


@dataclass(frozen=True)
class Model:
    """A file that a job needs. The pseudo VAE (`Automatic`, `None`) has no key: there is nothing to load."""

    type: str
    name: str
    id: str
    all_names: list[str]
    s3_location: str
    key: str = ""
    size_bytes: int = 0
    sha256: str = ""

    @property
    def cache_key(self) -> str:
        """Identifies the content for a worker's cache."""
        return self.sha256 or f"{self.id}/{self.name}"

    def as_dict(self) -> dict[str, Any]:
        """For the job's row; `Model(**row)` reads it."""
        return asdict(self)


class Peers:
    """Three services, and what identity knows of `users`."""

    def __init__(self, endpoints: grpc.aio.Channel, models: grpc.aio.Channel, identity: grpc.aio.Channel) -> None:
        self._endpoints = endpoints_pb2_grpc.EndpointsServiceStub(endpoints)
        self._models = models_pb2_grpc.ModelsServiceStub(models)
        self.users = Users(identity)

    async def find_endpoints(self, inference_type: str, user: Viewer, pinned_name: str = "") -> list[Endpoint]:
        """The endpoints that the user's jobs of the type may run on; with a name, that one in any state.

        Raises:
            Unavailable: the endpoints service does not answer.
        """
        request = endpoints_pb2.FindEndpointsRequest(
            endpoint_name=pinned_name, inference_type=inference_type, username=user.name, roles=user.roles
        )
        response = await answer(self._endpoints.FindEndpoints(request, timeout=_TIMEOUT_SECONDS), "endpoints")
        return [
            Endpoint(UUID(found.id), found.endpoint_name, found.endpoint_status, found.instance_type)
            for found in response.endpoints
        ]

    async def resolve_checkpoints(
        self, names: list[tuple[str, str]], user: Viewer
    ) -> tuple[list[Model], list[tuple[str, str]]]:
        """The files of the (type, name) pairs that the user may use, and the pairs for which there is none.

        Raises:
            Unavailable: the models service does not answer.
        """
        request = models_pb2.ResolveCheckpointsRequest(
            names=[models_pb2.CheckpointName(type=kind, name=name) for kind, name in names],
            username=user.name,
            roles=user.roles,
            sees_everything=user.sees_everything,
        )
        response = await answer(self._models.ResolveCheckpoints(request, timeout=_TIMEOUT_SECONDS), "models")
        found = [
            Model(
                type=file.type,
                name=file.name,
                id=file.id,
                all_names=list(file.all_names),
                s3_location=file.s3_location,
                key=file.key,
                size_bytes=file.size_bytes,
                sha256=file.sha256,
            )
            for file in response.checkpoints
        ]
        return found, [(missing.type, missing.name) for missing in response.missing]
