"""A refiner and a second pass's checkpoint: how they are named, in which pass, and that they are the job's."""

from typing import Any

import pytest

from services.common.errors import InvalidArgument
from services.common.payloads import Generation, Txt2Img, check, used

MODELS = [("Stable-diffusion", "base.safetensors"), ("Stable-diffusion", "fine.safetensors"), ("VAE", "a.pt")]


def txt2img(**fields: Any) -> Txt2Img:
    request = check("txt2img", fields, "job")
    assert isinstance(request, Txt2Img)
    assert check("txt2img", request.model_dump(), "job") == request
    return request


@pytest.mark.parametrize(
    "fields",
    [
        {"refiner_checkpoint": "fine.safetensors [abc123]", "refiner_switch_at": 0.6},
        {"alwayson_scripts": {"Refiner": {"args": [True, "fine", 0.6]}}},
        {"refiner_checkpoint": "other", "alwayson_scripts": {"refiner": {"args": [True, "fine", 0.6]}}},
        {"alwayson_scripts": {"Refiner": {"args": [1, "fine", 0.6]}}},
    ],
)
def test_it_is_named_by_field_or_script(fields: dict[str, Any]) -> None:
    request = txt2img(**fields)
    assert request.refiner_switch_at == 0.6
    assert used(request, MODELS) == [0, 1, 2]
    assert request.ignored == []


def test_without_a_name_there_is_none() -> None:
    for fields in (
        {"refiner_checkpoint": "None", "refiner_switch_at": None},
        {"alwayson_scripts": {"refiner": {"args": [False, "fine", 0.6]}}},
        {"alwayson_scripts": {"refiner": {"args": [True, "None", 0.6]}}},
        {"alwayson_scripts": {"refiner": {"args": []}}},
        {"alwayson_scripts": {"refiner": {"args": ["false", "fine", 0.6]}}},
    ):
        request = txt2img(**fields)
        assert used(request, MODELS) == [0, 2]
        assert request.ignored == []
    assert txt2img(refiner_checkpoint="fine").refiner_switch_at == 0.8


@pytest.mark.parametrize(
    ("chosen", "first", "second"),
    [(None, "", "fine"), ("first pass", "fine", ""), ("second pass", "", "fine"), ("both passes", "fine", "fine")],
)
def test_of_two_passes_the_second_has_it_unless_the_setting_says_otherwise(
    chosen: str | None, first: str, second: str
) -> None:
    settings = {"hires_fix_refiner_pass": chosen}
    request = txt2img(refiner_checkpoint="fine", enable_hr=True, override_settings=settings)
    assert request.second_pass is not None
    assert (request.refiner, request.second_pass.refiner) == (first, second)
    assert used(request, MODELS) == [0, 1, 2]


@pytest.mark.parametrize(
    ("num_steps", "switch_at", "first"), [(20, 0.8, 16), (7, 0.5, 4), (5, 0.0, 0), (5, 1.0, 5), (10, 0.3, 3)]
)
def test_it_takes_over_at_the_first_step_before_which_its_part_is_done(
    num_steps: int, switch_at: float, first: int
) -> None:
    assert txt2img(steps=num_steps, refiner_switch_at=switch_at).first_refined_step == first


def test_a_second_pass_has_its_own_checkpoint_or_the_first_ones() -> None:
    request = txt2img(enable_hr=True, hr_checkpoint_name="fine", override_settings={"sd_model_checkpoint": "base"})
    assert request.second_pass is not None
    assert request.second_pass.model_name == "fine"
    assert used(request, MODELS) == [0, 1, 2]
    for none in ("Use same checkpoint", "", None):
        request = txt2img(enable_hr=True, hr_checkpoint_name=none)
        assert used(request, MODELS) == [0, 2]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"refiner_checkpoint": "gone"},
            "refiner_checkpoint names gone, which is not among the job's models of type Stable-diffusion; there: base.",
        ),
        ({"enable_hr": True, "hr_checkpoint_name": "gone"}, "hr_checkpoint_name names gone, which is not among"),
    ],
)
def test_one_that_the_job_does_not_have_is_refused_by_name(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        used(txt2img(**fields), MODELS)
    assert sentence in str(refused.value)


def test_a_switch_out_of_range_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="refiner_switch_at 2 is out of range: 0 to 1 is possible"):
        check("txt2img", {"refiner_switch_at": 2}, "job")
    with pytest.raises(InvalidArgument, match='refiner_pass "third": input should be'):
        check("txt2img", {"override_settings": {"hires_fix_refiner_pass": "third"}}, "job")


def test_img2img_has_one_too() -> None:
    picture = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
    request = check("img2img", {"init_images": [picture], "refiner_checkpoint": "fine"}, "job")
    assert isinstance(request, Generation)
    assert used(request, MODELS) == [0, 1, 2]
