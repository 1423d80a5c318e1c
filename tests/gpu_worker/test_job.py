"""Payloads: what is absent, what is wrong, and numbers that came through a Struct."""

import sys
from typing import Any

import pytest
from google.protobuf.struct_pb2 import Struct

from gpu_worker.job import JobError, Txt2Img, to_python
from gpu_worker.worker import _parse


def test_what_is_absent_or_null_has_the_default_of_a1111() -> None:
    request = Txt2Img.from_payload({"steps": None}, "7e1f0d5e-8d0c-4b5c-9a51-0d3c4f2b6a10")
    assert (request.width, request.height, request.steps, request.cfg_scale) == (512, 512, 50, 7.0)
    assert (request.sampler_name, request.batch_size, request.n_iter, request.prompt) == ("Euler", 1, 1, "")


def test_a_random_seed_is_the_same_for_every_try_of_the_job() -> None:
    job_id = "7e1f0d5e-8d0c-4b5c-9a51-0d3c4f2b6a10"
    assert Txt2Img.from_payload({"seed": -1}, job_id) == Txt2Img.from_payload({}, job_id)
    assert Txt2Img.from_payload({}, job_id).seed != Txt2Img.from_payload({}, "another").seed


def test_the_older_name_of_the_sampler_field_counts_when_the_newer_is_absent() -> None:
    assert Txt2Img.from_payload({"sampler_index": "Euler a"}, "job").sampler_name == "Euler a"


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ({"width": 100}, "width is 100; it must be a multiple of 8"),
        ({"steps": 0}, "steps is 0; it must be from 1 to 1000"),
        ({"steps": 100000}, "steps is 100000; it must be from 1 to 1000"),
        ({"steps": "many"}, "steps must be a whole number, not 'many'"),
        ({"steps": 2.5}, "steps must be a whole number, not 2.5"),
        ({"prompt": 3}, "prompt must be text, not 3"),
        ({"cfg_scale": float("inf")}, "cfg_scale must be a number, not inf"),
        ({"width": True}, "width must be a whole number, not True"),
        ({"batch_size": 50, "n_iter": 50}, "at most 100 images"),
        ({"width": 8192, "height": 8192}, "too many pixels"),
    ],
)
def test_a_wrong_value_is_named_with_its_field(payload: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=message.replace("(", r"\(")):
        Txt2Img.from_payload(payload, "job")


def test_numbers_come_back_from_a_struct_as_they_went_in() -> None:
    struct = Struct()
    payload = {"steps": 20, "seed": 156680208700286, "cfg_scale": 7.5, "styles": [], "script": None, "on": False}
    struct.update(payload | {"s_tmax": float("inf")})
    found = to_python(struct)
    assert found == payload | {"s_tmax": sys.float_info.max}
    assert isinstance(found["seed"], int)


def test_a_large_payload_may_hold_infinity_but_not_nan() -> None:
    assert _parse(b'{"s_tmax": Infinity, "s": -Infinity}') == {"s_tmax": sys.float_info.max, "s": -sys.float_info.max}
    for content in (b'{"s": NaN}', b"{", b"\xff\xff", b"[]"):
        with pytest.raises(JobError, match="payload is not"):
            _parse(content)
