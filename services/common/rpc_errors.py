"""Owns how errors travel between services: ours become gRPC statuses, and what another service answers becomes ours."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

import grpc
import structlog

from services.common.errors import (
    AlreadyExists,
    EsdError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)

log = structlog.get_logger()

STATUS_OF: dict[type[EsdError], grpc.StatusCode] = {
    InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    NotFound: grpc.StatusCode.NOT_FOUND,
    AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
}
_KIND_OF = {status: kind for kind, status in STATUS_OF.items()} | {grpc.StatusCode.DEADLINE_EXCEEDED: Unavailable}


async def answer(call: Awaitable[Any], service: str) -> Any:
    """The response of another service to a unary call.

    Raises:
        EsdError: what `domain_error` makes of its failure.
    """
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise domain_error(error, service) from error


def domain_error(error: grpc.aio.AioRpcError, service: str) -> EsdError:
    """The error of our own kind for a failed call to another service, for peers to raise.

    A peer that refuses us refuses our own token: that is our trouble, not something the user may or may not do.
    """
    kind = _KIND_OF.get(error.code())
    if kind in {Unauthenticated, PermissionDenied}:
        log.error("a service refuses ours", service=service, code=error.code().name, details=error.details())
        return Unavailable(f"the {service} service refuses this service at present")
    if kind is Unavailable:
        return Unavailable(f"the {service} service does not answer at present")
    if kind is None:
        return Unavailable(f"the {service} service failed")
    return kind(error.details() or "")
