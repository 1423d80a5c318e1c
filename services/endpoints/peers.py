"""Wraps the stubs of the services that this one calls; answers plain values, raises errors of our own kind."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import grpc

from esd.identity.v1 import identity_pb2
from esd.inference.v1 import inference_pb2, inference_pb2_grpc
from esd.models.v1 import models_pb2, models_pb2_grpc
from esd.options.v1 import options_pb2
from services.common.auth import Kind
from services.common.payloads.models import BASE
from services.common.rpc_errors import answer, domain_error
from services.common.users import Users
from services.common.viewer import Viewer
from services.endpoints.scaling import Load

_TIMEOUT_SECONDS = 10.0
_CALLERS = {Kind.WORKER: options_pb2.CALLER_WORKER, Kind.TRAINER: options_pb2.CALLER_TRAINER}


class Identity(Users):
    """The identity service: users, and the secrets of what this service starts."""

    async def create_secret(self, kind: Kind, owner_id: str) -> str:
        """A new secret for the workers of an endpoint or for a task, in place of any earlier one."""
        request = identity_pb2.CreateSecretRequest(caller=_CALLERS[kind], subject=owner_id)
        response = await answer(self._stub.CreateSecret(request, timeout=_TIMEOUT_SECONDS), "identity")
        return str(response.secret)

    async def delete_secret(self, kind: Kind, owner_id: str) -> None:
        """Makes the secret worthless; idempotent."""
        request = identity_pb2.DeleteSecretRequest(caller=_CALLERS[kind], subject=owner_id)
        await answer(self._stub.DeleteSecret(request, timeout=_TIMEOUT_SECONDS), "identity")


class Models:
    """The models service."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = models_pb2_grpc.ModelsServiceStub(channel)

    async def find_missing(self, names: Sequence[str], user: Viewer) -> list[str]:
        """Those of the names that are no base checkpoint which the user may use. By base checkpoints jobs are batched,
        and they take long to load.

        Raises:
            Unavailable.
        """
        request = models_pb2.ResolveCheckpointsRequest(
            names=[models_pb2.CheckpointName(type=BASE, name=name) for name in names],
            username=user.name,
            roles=user.roles,
            sees_everything=user.sees_everything,
        )
        response = await answer(self._stub.ResolveCheckpoints(request, timeout=_TIMEOUT_SECONDS), "models")
        return [missing.name for missing in response.missing]


class Queue:
    """The inference service's queue."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = inference_pb2_grpc.QueueServiceStub(channel)

    async def watch_pools(self) -> AsyncIterator[dict[str, Load]]:
        """The load of every endpoint that has workers or jobs, by id: now, and at every change.

        Raises:
            Unavailable: the stream broke; a new one begins with everything again.
        """
        try:
            stream = self._stub.WatchPools(inference_pb2.WatchPoolsRequest(), wait_for_ready=True)
            async for response in stream:
                yield {pool.endpoint_id: _load(pool) for pool in response.pools}
        except grpc.aio.AioRpcError as error:
            raise domain_error(error, "inference") from error

    async def retire_endpoint(self, endpoint_id: str, reason: str) -> None:
        """Moves the endpoint's jobs to another one, or fails them with the reason; idempotent."""
        request = inference_pb2.RetireEndpointRequest(endpoint_id=endpoint_id, reason=reason)
        await answer(self._stub.RetireEndpoint(request, timeout=_TIMEOUT_SECONDS), "inference")

    async def pin_models(self, endpoint_id: str, names: list[str]) -> None:
        """Says which checkpoints the endpoint's workers keep ready; idempotent."""
        request = inference_pb2.PinModelsRequest(endpoint_id=endpoint_id, names=names)
        await answer(self._stub.PinModels(request, timeout=_TIMEOUT_SECONDS), "inference")


def _load(pool: inference_pb2.Pool) -> Load:
    work_seconds = pool.work_seconds if pool.HasField("work_seconds") else None
    return Load(frozenset(pool.worker_ids), pool.num_queued, pool.num_running, work_seconds)
