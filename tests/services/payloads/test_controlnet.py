"""ControlNet units: which are on, how they are spelled, and which cannot be had."""

import json
from typing import Any

import pytest

from services.common.errors import InvalidArgument
from services.common.payloads import Generation, check, used
from services.common.payloads.controlnet import Unit
from tests.pictures import encoded, mask, noise

IMAGE = encoded(noise())
MODELS = [
    ("Stable-diffusion", "base.safetensors"),
    ("ControlNet", "control_v11p_sd15_canny.pth"),
    ("ControlNet", "control_v11f1e_sd15_tile_fp16.safetensors"),
]


def request_of(*units: Any, task: str = "txt2img", **fields: Any) -> Generation:
    request = check(task, fields | {"alwayson_scripts": {"ControlNet": {"args": list(units)}}}, "job")
    assert isinstance(request, Generation)
    assert check(task, json.loads(json.dumps(request.model_dump())), "job") == request
    return request


def unit_of(**fields: Any) -> Unit:
    (found,) = request_of({"model": "control_v11p_sd15_canny [d14c016b]", "image": IMAGE} | fields).controlnet
    return found


def test_a_unit_as_the_original_client_sends_it() -> None:
    unit = unit_of(
        enabled=True,
        module="canny",
        weight=0.7,
        image={"image": f"data:image/png;base64,{IMAGE}", "mask": encoded(mask((0, 0, 8, 8)))},
        resize_mode="Resize and Fill",
        low_vram=False,
        processor_res=640,
        threshold_a=64,
        threshold_b=-1,
        guidance_start=0.1,
        guidance_end=0.9,
        pixel_perfect=False,
        control_mode="My prompt is more important",
        is_ui=True,
        input_mode="simple",
        batch_images="",
        output_dir="",
        loopback=False,
    )
    assert unit.model_dump(exclude={"image", "mask", "model"}) == {
        "module": "canny",
        "threshold_a": 64,
        "threshold_b": 200,
        "processor_res": 640,
        "weight": 0.7,
        "guidance_start": 0.1,
        "guidance_end": 0.9,
        "resize_mode": "Resize and Fill",
        "control_mode": "My prompt is more important",
        "hr_option": "Both",
        "save_detected_map": True,
    }
    assert unit.image is not None
    assert unit.mask is not None


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ({"module": "invert (from white bg & black line)"}, "module", "invert"),
        ({"module": "inpaint_global_harmonious"}, "module", "inpaint"),
        ({"module": "None"}, "module", "none"),
        ({"module": "canny", "threshold_a": 999}, "threshold_a", 100),
        ({"module": "blur_gaussian"}, "threshold_a", 9),
        ({"pixel_perfect": True}, "processor_res", 0),
        ({"processor_res": -1}, "processor_res", 512),
        ({"resize_mode": 0}, "resize_mode", "Just Resize"),
        ({"resize_mode": "Inner Fit (Scale to Fit)"}, "resize_mode", "Crop and Resize"),
        ({"resize_mode": "Scale to Fit (Inner Fit)"}, "resize_mode", "Crop and Resize"),
        ({"resize_mode": "Envelope (Outer Fit)"}, "resize_mode", "Resize and Fill"),
        ({"control_mode": 2}, "control_mode", "ControlNet is more important"),
        ({"hr_option": "high res only"}, "hr_option", "High res only"),
        ({"image": None, "input_image": IMAGE}, "image", IMAGE),
        ({"image": IMAGE, "input_image": None}, "image", IMAGE),
        ({"mask": None, "mask_image": IMAGE}, "mask", IMAGE),
        ({"mask": IMAGE, "mask_image": ""}, "mask", IMAGE),
        ({"guidance_end": 0.5, "guidance": None}, "guidance_end", 0.5),
        ({"control_mode": ["Balanced"]}, "control_mode", "Balanced"),
        ({"pixel_perfect": "true", "enabled": 1}, "processor_res", 0),
        ({"module": "canny", "threshold_a": "64", "enabled": "true"}, "threshold_a", 64),
        ({"module": "canny", "threshold_a": "low"}, "threshold_a", 100),
        ({"weight": None}, "weight", 1.0),
    ],
)
def test_other_spellings_mean_the_same(given: dict[str, Any], name: str, value: Any) -> None:
    assert getattr(unit_of(**given), name) == value


def test_units_that_are_off_or_have_no_model_do_nothing() -> None:
    off = [
        {"enabled": False, "module": "openpose", "model": "x", "image": "%"},
        {"enabled": True, "module": "canny", "model": "None"},
        {"enabled": "false", "module": "openpose", "model": "x", "image": "%"},
        {"enabled": 0, "module": "openpose", "model": "x", "image": "%"},
        {"module": "none"},
        "no unit",
    ]
    request = request_of(*off)
    assert (request.controlnet, request.num_images) == ([], 1)
    assert request.ignored == ["controlnet unit 1, which has no model"]  # the one that its client may have meant


def test_what_a_unit_asks_for_that_nothing_here_does_is_named() -> None:
    unit = {"model": "x", "image": IMAGE, "lowvram": True, "guessmode": True, "advanced_weighting": [1.0]}
    newer = {"effective_region_mask": None, "pulid_mode": "Fidelity", "union_control_type": "Unknown"}
    request = request_of(unit | newer)
    assert request.ignored == ["controlnet unit 0: guessmode", "controlnet unit 0: advanced_weighting"]


def test_what_each_unit_looked_at_is_a_picture_of_the_result() -> None:
    unit = {"model": "control_v11p_sd15_canny", "image": IMAGE}
    request = request_of(unit, unit | {"save_detected_map": False}, unit, batch_size=2)
    assert (request.num_painted, request.num_images) == (2, 4)
    assert request.cost_seconds == pytest.approx(2.2 * request_of(batch_size=2).cost_seconds)
    assert request.echo()["controlnet"][0]["image"] is None


def test_the_models_of_units_are_the_jobs_by_name_stem_or_beginning() -> None:
    units = [{"model": name, "image": IMAGE} for name in ("control_v11f1e_sd15_tile [a371b31b]", MODELS[1][1])]
    assert used(request_of(*units), MODELS) == [0, 2, 1]
    with pytest.raises(
        InvalidArgument, match="controlnet unit 0 names depth, which is not among the job's models of t"
    ):
        used(request_of({"model": "depth", "image": IMAGE}), MODELS)


def test_a_unit_has_a_say_from_its_start_to_its_end() -> None:
    unit = unit_of(guidance_start=0.25, guidance_end=0.5)
    assert [unit.acts_in(step, 8) for step in range(8)] == [False, False, True, True, True, False, False, False]
    assert not unit_of(weight=0).acts_in(0, 8)


def test_a_unit_that_ends_where_it_starts_has_a_say_in_that_step() -> None:
    unit = unit_of(guidance_start=0.5, guidance_end=0.5)
    assert [unit.acts_in(step, 4) for step in range(4)] == [False, False, True, False]


def test_img2imgs_own_picture_is_looked_at_where_a_unit_has_none() -> None:
    request = request_of({"model": "x"}, task="img2img", init_images=[IMAGE])
    assert request.controlnet[0].image is None
    assert request.echo()["init_images"] is None


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"module": "openpose_full"},
            'controlnet[0]: the module "openpose_full" cannot be run here; possible: none, canny, ',
        ),
        ({"module": " " * 200_000 + "x"}, 'controlnet[0]: the module "x" cannot be run here'),
        ({"module": "tile_colorfix+sharp"}, 'controlnet[0]: the module "tile_colorfix+sharp" cannot be run here'),
        ({"module": "inpaint_only+lama"}, 'the module "inpaint_only+lama" cannot be run here'),
        (
            {"module": "reference_only", "model": "None"},
            '"reference_only" is no ControlNet, and cannot be run here; dis',
        ),
        ({"module": "ip-adapter_clip_sd15"}, '"ip-adapter_clip_sd15" is no ControlNet'),
        ({"model": "ip-adapter_sd15 [abc]"}, "is no ControlNet, and cannot be run here"),
        ({"image": None}, "controlnet unit 0 is enabled, but has no image"),
        ({"image": "%"}, "controlnet[0]: image is not base64"),
        ({"mask": "aGVsbG8="}, "controlnet[0]: mask is no picture"),
        ({"image": [1]}, "controlnet unit 0: image is no picture in base64"),
        (
            {"resize_mode": "Stretch"},
            'resize_mode "Stretch" is not known; possible: Just Resize, Crop and Resize, Resi',
        ),
        ({"control_mode": True}, "control_mode true is not known; possible: Balanced, "),
        ({"weight": 3}, "controlnet[0].weight 3 is out of range: 0 to 2 is possible"),
        ({"guidance_end": -1}, "controlnet[0].guidance_end -1 is out of range: 0 to 1 is possible"),
        (
            {"guidance_start": 0.75, "guidance_end": 0.5},
            "controlnet[0]: guidance_end 0.5 lies before guidance_start 0.75: 0.75 to 1 is possible",
        ),
        ({"guidance_start": 2, "guidance_end": 0.5}, "controlnet[0].guidance_start 2 is out of range: 0 to 1"),
        ({"processor_res": 4096}, "controlnet[0].processor_res 4096 is out of range: 0 to 2048 is possible"),
        ({"weight": "much"}, 'controlnet[0].weight "much": input should be a valid number'),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        unit_of(**given)
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"module": "openpose"}, 'controlnet[0]: the module "openpose" cannot be run here'),
        ({"image": "%"}, "controlnet[0]: image is not base64"),
        ({"image": None}, "controlnet unit 0 is enabled, but has no image"),
        ({"control_mode": "Both"}, """controlnet[0].control_mode "Both": input should be 'Balanced', """),
    ],
)
def test_units_of_the_checked_form_are_checked_as_strictly(changes: dict[str, Any], sentence: str) -> None:
    """A client can send it too."""
    fields = request_of({"model": "x", "image": IMAGE}).model_dump()
    with pytest.raises(InvalidArgument) as refused:
        check("txt2img", fields | {"controlnet": [fields["controlnet"][0] | changes]}, "job")
    assert sentence in str(refused.value)


def test_a_threshold_out_of_bounds_is_the_default_in_the_checked_form_too() -> None:
    fields = request_of({"model": "x", "image": IMAGE, "module": "canny"}).model_dump()
    changed = check("txt2img", fields | {"controlnet": [fields["controlnet"][0] | {"threshold_a": 1e9}]}, "job")
    assert isinstance(changed, Generation)
    assert changed.controlnet[0].threshold_a == 100


def test_too_many_units_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="11 controlnet units are enabled; at most 10 are possible"):
        request_of(*[{"model": "x", "image": IMAGE}] * 11)
