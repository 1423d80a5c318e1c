"""The names on the wire, frozen: a renamed field breaks clients, so it must show in a review.

After a change on purpose: `ESD_WRITE_GOLDEN=1 pytest tests/gateway/test_json_names.py`, and read the difference.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from tests.protos import methods, route

GOLDEN = Path(__file__).with_name("json_names.txt")
TYPES = {
    value: name.removeprefix("TYPE_").lower()
    for name, value in vars(FieldDescriptor).items()
    if name.startswith("TYPE_")
}


def describe() -> str:
    """Every public RPC: verb, path and body, then the fields of its request and response as JSON names them."""
    blocks = []
    for method in methods():
        rest = route(method)
        if rest is None:
            continue
        lines = [f"{rest.verb} {rest.path} {method.full_name}" + (f" body={rest.body}" if rest.body else "")]
        lines += ["  request", *_fields(method.input_type, "    ")]
        lines += ["  response", *_fields(method.output_type, "    ")]
        blocks.append((rest.path, rest.verb, "\n".join(lines)))
    return "\n\n".join(text for _, _, text in sorted(blocks)) + "\n"


def _fields(message: Descriptor, indent: str) -> Iterator[str]:
    for field in message.fields:
        if field.message_type and field.message_type.GetOptions().map_entry:
            value = field.message_type.fields_by_name["value"]
            yield f"{indent}{field.json_name}: map of {_type(value)}"
            continue
        many = "list of " if field.is_repeated else ""
        yield f"{indent}{field.json_name}: {many}{_type(field)}"
        if field.message_type and not field.message_type.full_name.startswith("google.protobuf."):
            yield from _fields(field.message_type, indent + "  ")


def _type(field: FieldDescriptor) -> str:
    return field.message_type.name if field.message_type else TYPES[field.type]


def test_the_names_on_the_wire_are_those_that_were_agreed() -> None:
    if os.environ.get("ESD_WRITE_GOLDEN"):
        GOLDEN.write_text(describe())
    assert describe() == GOLDEN.read_text(), "names on the wire have changed; see the first lines of this test"
