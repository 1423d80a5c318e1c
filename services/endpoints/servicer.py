"""Speaks EndpointsService: parses, calls the domain, replies."""

from __future__ import annotations

import re
from typing import Any

from google.protobuf.struct_pb2 import ListValue, Value

from esd.endpoints.v1 import endpoints_pb2 as pb
from esd.endpoints.v1 import endpoints_pb2_grpc as rpc
from services.common.auth import current_caller, enforce
from services.common.errors import InvalidArgument
from services.common.status import set_reply
from services.common.structs import json_value
from services.common.times import time_text
from services.common.viewer import Viewer
from services.endpoints.domain import Change, Endpoints, NewEndpoint, check_custom
from services.endpoints.rows import ASYNC, Endpoint

_DEFAULT_MIN, _DEFAULT_MAX = "0", "1"
_WHOLE_NUMBER = re.compile(r"-?[0-9]{1,18}")
_LARGEST_COUNT = 999_999_999  # what a column holds


class EndpointsServicer(rpc.EndpointsServiceServicer):
    """The endpoints' RPCs."""

    def __init__(self, endpoints: Endpoints) -> None:
        self._endpoints = endpoints

    async def ListEndpoints(self, request: pb.ListEndpointsRequest, context: Any) -> pb.ListEndpointsResponse:
        endpoints, next_key = await self._endpoints.list_endpoints(
            sees_all=current_caller().may("sagemaker_endpoint:all"),
            username=request.username,
            endpoint_id=request.endpoint_id,
            limit=request.limit,
            key=request.exclusive_start_key,
        )
        return pb.ListEndpointsResponse(
            endpoints=[_message(row) for row in endpoints], last_evaluated_key=json_value(next_key)
        )

    async def CreateEndpoint(self, request: pb.CreateEndpointRequest, context: Any) -> pb.CreateEndpointResponse:
        # These are 400 before a caller without permission is 403 (contract 5.3), so the permission is judged here.
        check_custom(request.custom_extensions, request.custom_docker_image_uri)
        minimum = _sent_or(_DEFAULT_MIN, request.min_instance_number)
        maximum = _sent_or(_DEFAULT_MAX, request.max_instance_number)
        new = _new_endpoint(request, _count("min_instance_number", minimum), _count("max_instance_number", maximum))
        enforce()

        row = await self._endpoints.create_endpoint(new, creator=current_caller().name)
        set_reply(message=f"Endpoint deployment started: {row.name}")
        message = _message(row)
        message.min_instance_number.CopyFrom(minimum)
        message.max_instance_number.CopyFrom(maximum)
        return pb.CreateEndpointResponse(data=message)

    async def UpdateEndpoint(self, request: pb.UpdateEndpointRequest, context: Any) -> pb.UpdateEndpointResponse:
        body = request.body
        change = Change(
            autoscaling=body.autoscaling_enabled if body.HasField("autoscaling_enabled") else None,
            num_min=_count_or_none("min_instance_number", body.min_instance_number),
            num_max=_count_or_none("max_instance_number", body.max_instance_number),
            drain=body.drain if body.HasField("drain") else None,
            pinned=_names(body.pinned_checkpoints) if body.HasField("pinned_checkpoints") else None,
        )
        row = await self._endpoints.update_endpoint(request.endpoint_id, change, by=Viewer.of(current_caller()))
        return pb.UpdateEndpointResponse(data=_message(row))

    async def ListEndpointEvents(
        self, request: pb.ListEndpointEventsRequest, context: Any
    ) -> pb.ListEndpointEventsResponse:
        caller = current_caller()
        viewer = Viewer(caller.name, list(caller.roles), sees_everything=caller.may("sagemaker_endpoint:all"))
        found, next_key = await self._endpoints.list_events(
            request.endpoint_id, viewer, limit=request.limit, key=request.exclusive_start_key
        )
        events = [
            pb.EndpointEvent(time=time_text(event.time), type=event.type, message=event.message) for event in found
        ]
        return pb.ListEndpointEventsResponse(events=events, last_evaluated_key=json_value(next_key))

    async def DeleteEndpoints(self, request: pb.DeleteEndpointsRequest, context: Any) -> pb.DeleteEndpointsResponse:
        await self._endpoints.delete_endpoints(list(request.endpoint_name_list))
        return pb.DeleteEndpointsResponse()

    async def FindEndpoints(self, request: pb.FindEndpointsRequest, context: Any) -> pb.FindEndpointsResponse:
        user = Viewer(request.username, list(request.roles))
        rows = await self._endpoints.find_endpoints(request.endpoint_name, request.inference_type, user)
        return pb.FindEndpointsResponse(endpoints=[_message(row) for row in rows])


def _new_endpoint(request: pb.CreateEndpointRequest, num_min: int, num_max: int) -> NewEndpoint:
    return NewEndpoint(
        name=request.endpoint_name,
        type=request.endpoint_type or ASYNC,
        instance_type=request.instance_type,
        num_initial=request.initial_instance_count,
        autoscaling=request.autoscaling_enabled,
        num_min=num_min,
        num_max=num_max,
        roles=list(request.assign_to_roles),
        custom_extensions=request.custom_extensions,
        custom_docker_image_uri=request.custom_docker_image_uri,
    )


def _sent_or(default: str, value: Value) -> Value:
    """The value as sent, which the answer echoes; the default, a text, where nothing or null was."""
    return value if value.WhichOneof("kind") in ("number_value", "string_value") else Value(string_value=default)


def _count(name: str, value: Value) -> int:
    """The whole number in a number or text.

    Raises:
        InvalidArgument: it is none, a number below 0, or too large to be kept.
    """
    found: int | None = None
    if value.WhichOneof("kind") == "number_value":
        if value.number_value < 0:
            below = f"(minimum: 0, found: {value.number_value:g})"
            raise InvalidArgument(f"[{name}: numeric instance is lower than the required minimum {below}]")
        if value.number_value.is_integer():
            found = int(value.number_value)
    elif _WHOLE_NUMBER.fullmatch(value.string_value.strip()):
        found = int(value.string_value)
    if found is None:
        raise InvalidArgument(
            f'[{name}: instance type (string) does not match any allowed primitive type (allowed: ["integer"])]'
        )
    if abs(found) > _LARGEST_COUNT:
        above = f"(maximum: {_LARGEST_COUNT}, found: {found:g})"
        raise InvalidArgument(f"[{name}: numeric instance is greater than the required maximum {above}]")
    return found


def _count_or_none(name: str, value: Value) -> int | None:
    return None if value.WhichOneof("kind") in (None, "null_value") else _count(name, value)


def _names(values: ListValue) -> tuple[str, ...]:
    """The names in a list.

    Raises:
        InvalidArgument: something else is in it.
    """
    if any(value.WhichOneof("kind") != "string_value" or not value.string_value for value in values.values):
        raise InvalidArgument("[pinned_checkpoints: a list of names of files is expected]")
    return tuple(value.string_value for value in values.values)


def _message(row: Endpoint) -> pb.Endpoint:
    return pb.Endpoint(
        id=row.id,
        endpoint_name=row.name,
        endpoint_type=row.type,
        endpoint_status=row.status,
        instance_type=row.instance_type,
        autoscaling=row.autoscaling,
        min_instance_number=json_value(str(row.num_min)),
        max_instance_number=json_value(str(row.num_max)),
        current_instance_count=str(row.num_live),
        start_time=time_text(row.start_time),
        end_time=json_value(time_text(row.end_time)),
        status=json_value(None),
        error=json_value(row.error),
        owner_group_or_role=row.owners,
        custom_extensions=row.custom_extensions,
        pinned_checkpoints=ListValue(values=[Value(string_value=name) for name in row.pinned]) if row.pinned else None,
    )
