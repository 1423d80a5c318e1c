"""JSON values as protobuf has them (Struct, Value, ListValue), and as Python has them; how large a request's may be."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from google.protobuf.struct_pb2 import NULL_VALUE, ListValue, Struct, Value

from services.common.errors import InvalidArgument

# Of params, which lists show of up to a thousand rows. Texts are cheap to show, other values are not.
MAX_PARAMS_BYTES = 64 * 1024
MAX_PARAMS_VALUES = 100


def most_values(text: str | bytes) -> int:
    """The most values that a JSON text can have, without reading it: each but the first has one of these before it."""
    marks: Iterable[Any] = b",[{" if isinstance(text, bytes) else ",[{"
    return 1 + sum(text.count(mark) for mark in marks)


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


def check_params(
    params: dict[str, Any],
    name: str = "params",
    max_bytes: int = MAX_PARAMS_BYTES,
    max_values: int = MAX_PARAMS_VALUES,
) -> None:
    """Refuses what a client wants to be kept and shown, if it is too large for that. `name` is its field.

    Raises:
        InvalidArgument.
    """
    num_bytes = len(json.dumps(params, ensure_ascii=False).encode())
    if num_bytes > max_bytes:
        raise InvalidArgument(f"{name}: {num_bytes} bytes as JSON are too much, {max_bytes} are allowed")
    if (number := num_values(params)) > max_values:
        raise InvalidArgument(f"{name}: {number} values are too many, {max_values} are allowed")


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
