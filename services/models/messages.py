"""Owns the conversions that the servicers of checkpoints and datasets share."""

from __future__ import annotations

from typing import Any

from google.protobuf import struct_pb2

from services.common.auth import current_caller
from services.models.domain import EVERYTHING
from services.models.store import Viewer


def viewer() -> Viewer:
    """The caller. The WebUI client names nobody where it finishes uploads; the interceptor let it in."""
    caller = current_caller()
    return Viewer(caller.name, caller.roles, caller.may(EVERYTHING) or caller.is_anonymous_webui)


def plain(value: struct_pb2.Struct) -> dict[str, Any]:
    """The struct as Python values; whole numbers are ints."""
    return {key: _plain_value(entry) for key, entry in value.fields.items()}


def _plain_value(value: struct_pb2.Value) -> Any:
    match value.WhichOneof("kind"):
        case "struct_value":
            return plain(value.struct_value)
        case "list_value":
            return [_plain_value(entry) for entry in value.list_value.values]
        case "number_value":
            number = value.number_value
            return int(number) if number.is_integer() else number
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
        case _:
            return None


def struct(values: dict[str, Any]) -> struct_pb2.Struct:
    """Python values as a struct."""
    message = struct_pb2.Struct()
    message.update(values)
    return message


def numbers_as_text(value: Any) -> Any:
    """Numbers read back from storage are text in lists (contract 1.7)."""
    if isinstance(value, dict):
        return {key: numbers_as_text(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [numbers_as_text(entry) for entry in value]
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
