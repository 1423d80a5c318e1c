"""JSON values that came through a Struct."""

import json
import sys
from typing import Any

import pytest
from google.protobuf.struct_pb2 import Struct

from services.common.structs import most_values, num_values, plain


def test_numbers_come_back_from_a_struct_as_they_went_in() -> None:
    struct = Struct()
    payload = {"steps": 20, "seed": 156680208700286, "cfg_scale": 7.5, "styles": [], "script": None, "on": False}
    struct.update(payload | {"s_tmax": float("inf")})
    found = plain(struct)
    assert found == payload | {"s_tmax": sys.float_info.max}
    assert isinstance(found["seed"], int)


@pytest.mark.parametrize(
    ("value", "number"), [({}, 1), ([[], {}, [[]]], 5), ({"a": [1, "b, [c"], "d": {"e": None}}, 6), ("x", 1)]
)
def test_values_are_counted_at_any_depth_and_never_fewer_in_text(value: Any, number: int) -> None:
    assert num_values(value) == number
    assert most_values(json.dumps(value)) >= number
    assert most_values(json.dumps(value)) == most_values(json.dumps(value).encode())
