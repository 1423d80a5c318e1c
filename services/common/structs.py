"""JSON values as protobuf has them (Struct, Value, ListValue), and as Python has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.struct_pb2 import NULL_VALUE, ListValue, Struct, Value


def struct(values: Mapping[str, Any]) -> Struct:
    """An object."""
    message = Struct()
    message.update(values)
    return message


def list_value(values: Sequence[Any]) -> ListValue:
    """A list."""
    message = ListValue()
    message.extend(values)
    return message


def json_value(given: Mapping[str, Any] | Sequence[Any] | str | None) -> Value:
    """An object, a list, a text or null."""
    if given is None:
        return Value(null_value=NULL_VALUE)
    if isinstance(given, str):
        return Value(string_value=given)
    if isinstance(given, Mapping):
        return Value(struct_value=struct(given))
    return Value(list_value=list_value(given))


def plain(message: Struct) -> dict[str, Any]:
    """An object in Python; whole numbers are ints."""
    return {name: _plain(entry) for name, entry in message.fields.items()}


def _plain(message: Value) -> Any:
    match message.WhichOneof("kind"):
        case "struct_value":
            return plain(message.struct_value)
        case "list_value":
            return [_plain(entry) for entry in message.list_value.values]
        case "number_value":
            number = message.number_value
            return int(number) if number.is_integer() else number
        case "string_value":
            return message.string_value
        case "bool_value":
            return message.bool_value
        case _:
            return None
