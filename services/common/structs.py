"""JSON values as protobuf has them (Struct, Value, ListValue), and as Python has them."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from google.protobuf.struct_pb2 import NULL_VALUE, ListValue, Struct, Value


def max_values(json: str | bytes) -> int:
    """The most values that a JSON text can have, without reading it: each but the first has one of these before it."""
    marks: Iterable[Any] = b",[{" if isinstance(json, bytes) else ",[{"
    return 1 + sum(json.count(mark) for mark in marks)


def num_values(value: Any) -> int:
    """How many values a JSON value is made of, itself included."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(num_values, inner))


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
    """An object in Python. Whole numbers are ints, which JSON and A1111's readers expect; infinity is the largest
    float, as the contract has it (10.1)."""
    return {name: _plain(entry) for name, entry in message.fields.items()}


def _plain(message: Value) -> Any:
    match message.WhichOneof("kind"):
        case "number_value":
            return _plain_number(message.number_value)
        case "list_value":
            return [_plain(entry) for entry in message.list_value.values]
        case "struct_value":
            return plain(message.struct_value)
        case "null_value" | None:
            return None
        case kind:
            return getattr(message, kind)


def _plain_number(number: float) -> int | float:
    if math.isinf(number):
        return math.copysign(sys.float_info.max, number)
    return int(number) if number.is_integer() and abs(number) < 2**63 else number
