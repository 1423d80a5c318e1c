"""Request rules of the protos (protovalidate), worded as the legacy API words them (contract 1.5)."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import protovalidate
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from services.common.errors import InvalidArgument

MAX_REPEATED = 100  # characters
MAX_STRUCTURE_BYTES = 512 * 1024  # 500 files of a dataset with the longest names need half of it

# From the id of a rule to its sentence; `value` is what was given, `bound` what the rule allows.
_SENTENCES: dict[str, Callable[[Any, Any], str]] = {
    "string.min_len": lambda value, bound: (
        f'string "{shortened(value)}" is too short (length: {len(value)}, required minimum: {bound})'
    ),
    "string.max_len": lambda value, bound: (
        f'string "{shortened(value)}" is too long (length: {len(value)}, maximum allowed: {bound})'
    ),
    "string.pattern": lambda value, bound: f'ECMA 262 regex "{bound}" does not match input string "{shortened(value)}"',
    "string.in": lambda value, bound: (
        f'instance value ("{shortened(value)}") not found in enum (possible values: {_list(bound)})'
    ),
    "repeated.min_items": lambda value, bound: (
        f"array is too short: must have at least {bound} elements but instance has {len(value)} elements"
    ),
    "repeated.max_items": lambda value, bound: (
        f"array is too long: must have at most {bound} elements but instance has {len(value)} elements"
    ),
    "int32.gte": lambda value, bound: (
        f"numeric instance is lower than the required minimum (minimum: {bound}, found: {value})"
    ),
    "int32.lte": lambda value, bound: (
        f"numeric instance is greater than the required maximum (maximum: {bound}, found: {value})"
    ),
}


def shortened(text: str) -> str:
    """What a message repeats of a client's text."""
    return text if len(text) <= MAX_REPEATED else f"{text[:MAX_REPEATED]}…"


def check_structure(data: bytes, kind: Descriptor) -> None:
    """Refuses a request that is large by other than its texts, before it is parsed. An empty list takes four bytes, and
    as much time to go through as some thousand letters; a megabyte of them would stop everything for seconds.

    Raises:
        InvalidArgument. DecodeError: it is no message.
    """
    if len(data) <= MAX_STRUCTURE_BYTES:
        return
    texts = {field.number for field in kind.fields if field.type == FieldDescriptor.TYPE_STRING}
    at = num_letters = 0
    while at < len(data) and at - num_letters <= MAX_STRUCTURE_BYTES:
        key, at = _varint(data, at)
        match key & 7:
            case 0:
                _, at = _varint(data, at)
            case 1 | 5 as fixed:
                at += 8 if fixed == 1 else 4
            case 2:
                length, at = _varint(data, at)
                at += length
                num_letters += length if key >> 3 in texts else 0
            case _:
                raise DecodeError
    if at - num_letters > MAX_STRUCTURE_BYTES:
        most = f"{MAX_STRUCTURE_BYTES // 1024} KiB"
        raise InvalidArgument(f"[the request has more than {most} of objects and lists, which is not possible here]")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of protobuf's wire format, and where it ends."""
    number = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
    raise DecodeError


async def hello(requests: AsyncIterator[Any], stream: str) -> Any:
    """What a worker or a trainer says of itself, in the first message of its stream, checked.

    Raises:
        InvalidArgument: the stream begins with something else, or with nothing.
    """
    async for request in requests:
        if request.WhichOneof("message") != "hello":
            raise InvalidArgument(f"the first message of a {stream} stream is hello")
        check(request)
        return request.hello
    raise InvalidArgument("the stream ended before its hello")


def check(request: Message) -> None:
    """Checks a request against the rules of its proto, and for what cannot be stored: NUL characters, which PostgreSQL
    does not take, and numbers that are not finite, which JSON does not have.

    Raises:
        InvalidArgument: all violations in one bracketed list, with the path of the field in front.
    """
    data = request.SerializeToString()
    # What is looked for has one of these bytes, as have many other requests; the rest need not be gone through.
    if any(byte in data for byte in (b"\0", b"\x7f", b"\xff")):
        for value in _texts_and_numbers(request):
            if isinstance(value, str) and "\0" in value:
                raise InvalidArgument(
                    "[a text of the request contains the character NUL (\\u0000), which is not possible here]"
                )
            if isinstance(value, float) and not math.isfinite(value):
                raise InvalidArgument("[a number of the request is not finite, which JSON cannot hold]")
    violations = protovalidate.collect_violations(request)
    if violations:
        raise InvalidArgument(f"[{', '.join(_sentences(violations, request))}]")


def _texts_and_numbers(value: Any) -> Iterator[str | float]:
    """All texts and fractions of a message, at any depth."""
    if isinstance(value, str | float):
        yield value
    elif isinstance(value, Message):
        for _, part in value.ListFields():
            yield from _texts_and_numbers(part)
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from _texts_and_numbers(name)
            yield from _texts_and_numbers(part)
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for part in value:
            yield from _texts_and_numbers(part)


def _sentences(violations: list[Any], request: Message) -> Iterable[str]:
    missing: dict[str, list[str]] = {}
    others: list[str] = []
    for violation in violations:
        path, name = _path(violation.proto.field, request)
        if violation.proto.rule_id == "required":
            missing.setdefault(path, []).append(name)
        else:
            others.append(_prefix(f"{path}.{name}".lstrip(".")) + _sentence(violation))
    for path, names in missing.items():
        yield _prefix(path) + f"object has missing required properties ({_list(sorted(names))})"
    yield from others


def _sentence(violation: Any) -> str:
    rule, value = violation.proto.rule_id, violation.field_value
    if rule == "int32.gte_lte":
        below = value < violation.rule_value
        return _SENTENCES["int32.gte" if below else "int32.lte"](value, _bounds(violation)[0 if below else 1])
    worded = _SENTENCES.get(rule)
    return worded(value, violation.rule_value) if worded else str(violation.proto.message)


def _bounds(violation: Any) -> tuple[int, int]:
    """The two numbers of a range rule, which the violation carries only in its message."""
    numbers = [int(word) for word in violation.proto.message.split() if word.lstrip("-").isdigit()]
    return numbers[0], numbers[1]


def _path(field: Any, request: Message) -> tuple[str, str]:
    """The path of the enclosing object and the field's name, as JSON spells them."""
    names: list[str] = []
    descriptor: Any = request.DESCRIPTOR
    for element in field.elements:
        known = descriptor.fields_by_name.get(element.field_name) if descriptor else None
        name = known.json_name if known else element.field_name
        index = getattr(element.subscript, "value", None)
        names.append(name if index is None else f"{name}[{index}]")
        descriptor = known.message_type if known else None
    # The HTTP body of some requests is a field of its own, which clients never see.
    if names[1:] and names[0] == "body":
        names = names[1:]
    return ".".join(names[:-1]), names[-1] if names else ""


def _prefix(path: str) -> str:
    return f"{path}: " if path else ""


def _list(values: Iterable[str]) -> str:
    return json.dumps(list(values), separators=(",", ":"))
