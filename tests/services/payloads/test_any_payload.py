"""Whatever a client writes into a payload: it is accepted or refused in a sentence, and what is accepted is stored and
read again as it is."""

import copy
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.common import payloads
from services.common.errors import InvalidArgument
from services.common.payloads import Generation
from services.inference.submitting.payload import check_payload
from tests.any_payload import EDITS, GENERATIONS

MODELS = [
    *(("Stable-diffusion", f"{name}.safetensors") for name in ("first", "second", "inpainting")),
    ("VAE", "vae.safetensors"),
    ("Lora", "style.safetensors"),
    ("ControlNet", "control.safetensors"),
    ("ESRGAN", "4x-tiny.pth"),
]
ODD_TEXTS = st.sampled_from([
    "", "1", "x", "None", "a\0", "\ud800", "é" * 300, "<lora:style:x>", "<lora:gone>", "a AND " * 9,
    "[a:b:1e999]", "(a:nan)", "[a:b:" * 99 + "1]" * 99, "(" * 500, "BREAK " * 99, "data:image/png;base64,", "AAAA",
])  # fmt: skip
ODD = st.sampled_from([
    None, [], {}, True, -1, 0, 1.5, 2**53, 10**30, 1e308, float("inf"), "1", "x", "a\0", [None], [[]], {"a": 1},
    ["a"] * 50, [{"model": "control"}],
])  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Where something can be put in the place of something else: each object or list with its names or numbers."""
    names: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
    inner = [place for name in names if isinstance(value[name], dict | list) for place in places(value[name])]
    return [(value, name) for name in names] + inner


@st.composite
def written(draw: Any) -> tuple[str, dict[str, Any]]:
    """A payload with up to three odd values, or odd names."""
    task_type, payload = copy.deepcopy(draw(st.one_of(GENERATIONS, GENERATIONS, EDITS)))
    for _ in range(draw(st.integers(1, 3))):
        container, name = draw(st.sampled_from(places(payload)))
        odd = ODD_TEXTS if isinstance(container[name], str) else ODD
        if isinstance(container, dict) and draw(st.integers(0, 4)) == 0:
            name = draw(st.sampled_from(["a\0b", "\ud800", "form", "plot", "ignored", "restore_faces"]))
        container[name] = copy.deepcopy(draw(odd))
    return task_type, payload


@pytest.mark.slow
@settings(max_examples=1000, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(written())
def test_a_payload_is_refused_in_a_sentence_or_kept_as_it_is_read(payload: tuple[str, dict[str, Any]]) -> None:
    task_type, fields = payload
    try:
        checked = check_payload(json.dumps(fields), task_type, "job")
        payloads.used(checked.request, MODELS)
    except InvalidArgument as refusal:
        is_sentence = "\n" not in str(refusal) and "pydantic" not in str(refusal)
    else:
        is_sentence = True
        assert check_payload(checked.encoded, task_type, "another job").encoded == checked.encoded
        values = [container[name] for container, name in places(checked.fields)]
        assert not any("\0" in value for value in values if isinstance(value, str))  # which JSONB does not take
        assert checked.cost_seconds > 0
        assert checked.request.echo()
        if isinstance(checked.request, Generation):
            assert len(checked.request.cells()) == (checked.request.plot.num_cells if checked.request.plot else 1)
    assert is_sentence
