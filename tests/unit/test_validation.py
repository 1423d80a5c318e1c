"""The sentences of contract 1.5, for the rules that the protos use."""

from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message

from buf.validate import validate_pb2
from esd.endpoints.v1 import endpoints_pb2
from esd.identity.v1 import identity_pb2
from esd.inference.v1 import inference_pb2  # noqa: F401 - its messages are walked through
from esd.models.v1 import models_pb2
from esd.training.v1 import training_pb2  # noqa: F401
from services.common import validation
from services.common.errors import InvalidArgument

ENDPOINT = {
    "instance_type": "any",
    "initial_instance_count": 1,
    "autoscaling_enabled": False,
    "assign_to_roles": ["r"],
}


def _file(**fields: Any) -> dict[str, Any]:
    return {"checkpoint_type": "Lora", "filenames": [{"filename": "a", "parts_number": 1, **fields}], "params": {}}


CASES = [
    (
        identity_pb2.CreateRoleRequest,
        {},
        '[object has missing required properties (["permissions","role_name"])]',
    ),
    (
        identity_pb2.CreateRoleRequest,
        {"role_name": "", "permissions": ["a"]},
        '[role_name: string "" is too short (length: 0, required minimum: 1)]',
    ),
    (
        identity_pb2.CreateRoleRequest,
        {"role_name": "r", "permissions": ["a", ""]},
        '[permissions[1]: string "" is too short (length: 0, required minimum: 1)]',
    ),
    (
        identity_pb2.CreateRoleRequest,
        {"role_name": "r", "permissions": ["a"] * 21},
        "[permissions: array is too long: must have at most 20 elements but instance has 21 elements]",
    ),
    (models_pb2.UpdateDatasetRequest, {}, '[object has missing required properties (["body"])]'),
    (models_pb2.UpdateDatasetRequest, {"body": {}}, '[object has missing required properties (["status"])]'),
    (
        endpoints_pb2.CreateEndpointRequest,
        {**ENDPOINT, "endpoint_type": "Slow"},
        '[endpoint_type: instance value ("Slow") not found in enum '
        '(possible values: ["Real-time","Serverless","Async"])]',
    ),
    (
        endpoints_pb2.CreateEndpointRequest,
        {**ENDPOINT, "endpoint_name": "x" * 21},
        f'[endpoint_name: string "{"x" * 21}" is too long (length: 21, maximum allowed: 20)]',
    ),
    (
        endpoints_pb2.CreateEndpointRequest,
        {**ENDPOINT, "endpoint_name": "a b"},
        '[endpoint_name: ECMA 262 regex "^[A-Za-z0-9-]*$" does not match input string "a b"]',
    ),
    (
        models_pb2.CreateCheckpointRequest,
        _file(parts_number=0),
        "[filenames[0].parts_number: numeric instance is lower than the required minimum (minimum: 1, found: 0)]",
    ),
    (
        models_pb2.CreateCheckpointRequest,
        _file(parts_number=101),
        "[filenames[0].parts_number: numeric instance is greater than the required maximum (maximum: 100, found: 101)]",
    ),
    (
        models_pb2.CreateCheckpointRequest,
        {"checkpoint_type": "Lora", "filenames": [{"parts_number": 1}], "params": {}},
        '[filenames[0]: object has missing required properties (["filename"])]',
    ),
    (
        models_pb2.UpdateCheckpointRequest,
        {"checkpointId": "x", "body": {"name": "9"}},
        'name: ECMA 262 regex "^[A-Za-z][A-Za-z0-9_-]*$" does not match input string "9"',
    ),
    (
        identity_pb2.CreateUserRequest,
        {"username": "", "roles": [""]},
        '[object has missing required properties (["password"]), '
        'username: string "" is too short (length: 0, required minimum: 1), '
        'roles[0]: string "" is too short (length: 0, required minimum: 1)]',
    ),
]


@pytest.mark.parametrize(("message", "body", "sentence"), CASES)
def test_a_broken_rule_has_its_sentence(message: type[Message], body: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidArgument) as failure:
        validation.check(ParseDict(body, message()))
    assert sentence in str(failure.value)
    assert (str(failure.value)[0], str(failure.value)[-1]) == ("[", "]")


@pytest.mark.parametrize(
    ("message", "body"),
    [
        (identity_pb2.CreateRoleRequest, {"role_name": "r", "permissions": ["a"] * 20}),
        (endpoints_pb2.CreateEndpointRequest, ENDPOINT),
        (endpoints_pb2.CreateEndpointRequest, {**ENDPOINT, "endpoint_type": "Async", "endpoint_name": "x" * 20}),
        (models_pb2.CreateCheckpointRequest, _file(parts_number=100)),
    ],
)
def test_what_is_within_the_rules_passes(message: type[Message], body: dict[str, Any]) -> None:
    validation.check(ParseDict(body, message()))


def test_a_value_that_is_false_or_zero_is_not_missing() -> None:
    validation.check(ParseDict({**ENDPOINT, "initial_instance_count": 0}, endpoints_pb2.CreateEndpointRequest()))


def _all_rules() -> Iterator[tuple[str, str]]:
    """Every rule that a field of our protos uses, as (field, rule id)."""
    pool = descriptor_pool.Default()
    for package in ("identity", "models", "endpoints", "inference", "training"):
        for message in pool.FindFileByName(f"esd/{package}/v1/{package}.proto").message_types_by_name.values():
            yield from _rules_of(message)


def _rules_of(message: Descriptor) -> Iterator[tuple[str, str]]:
    for field in message.fields:
        rules = field.GetOptions().Extensions[validate_pb2.field]
        for kind in ("string", "repeated", "int32"):
            if rules.HasField(kind):
                for rule, _ in getattr(rules, kind).ListFields():
                    yield field.full_name, f"{kind}.{rule.name}"


def test_every_rule_in_the_protos_has_a_sentence() -> None:
    worded = {*validation._SENTENCES, "string.uuid", "repeated.items"}
    used = set(_all_rules())
    assert used, "the walk finds rules"
    assert {(field, rule) for field, rule in used if rule not in worded} == set()
