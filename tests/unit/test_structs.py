"""JSON values that came through a Struct."""

import sys

from google.protobuf.struct_pb2 import Struct

from services.common.structs import plain


def test_numbers_come_back_from_a_struct_as_they_went_in() -> None:
    struct = Struct()
    payload = {"steps": 20, "seed": 156680208700286, "cfg_scale": 7.5, "styles": [], "script": None, "on": False}
    struct.update(payload | {"s_tmax": float("inf")})
    found = plain(struct)
    assert found == payload | {"s_tmax": sys.float_info.max}
    assert isinstance(found["seed"], int)
