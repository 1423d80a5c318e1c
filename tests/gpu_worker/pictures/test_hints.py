"""What units look at: prepared, at the size of each pass, with what is to be painted."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from gpu_worker.job import JobError
from gpu_worker.pictures.canvas import Canvas
from gpu_worker.pictures.hints import Hint, prepared
from services.common.payloads import check
from services.common.payloads.pictures import Damaged
from tests.pictures import encoded, mask, noise

WIDE = Image.fromarray(np.tile(np.linspace(0, 255, 128, dtype=np.uint8)[None, :, None], (64, 1, 3)))


def canvas_of(task: str = "txt2img", unit: Any = None, job_id: str = "job", **fields: Any) -> Canvas:
    given = {"model": "x", "image": encoded(WIDE)} | (unit or {})
    scripts = {"controlnet": {"args": [{name: value for name, value in given.items() if value is not None}]}}
    small = {"width": 64, "height": 64, "seed": 3, "alwayson_scripts": scripts}
    return prepared(check(task, small | fields, job_id))  # type: ignore[arg-type]


def hint_of(*task_and_unit: Any, **fields: Any) -> Hint:
    (hint,) = canvas_of(*task_and_unit, **fields).hints
    return hint


@pytest.mark.parametrize(
    ("mode", "left", "right", "is_stretched"),
    [("Just Resize", 0, 255, True), ("Crop and Resize", 64, 191, False), ("Resize and Fill", 0, 255, True)],
)
def test_it_is_stretched_cut_or_filled_up_to_the_jobs_size(
    mode: str, left: int, right: int, is_stretched: bool
) -> None:
    hint = hint_of(unit={"resize_mode": mode})
    assert hint.first is not None
    row = hint.first.pixels[32, :, 0].astype(int)
    assert hint.first.pixels.shape == (64, 64, 3)
    assert abs(row[0] - left) < 6
    assert abs(row[-1] - right) < 6
    top = hint.first.pixels[0, :, 0]
    assert (np.ptp(top) == 0) == (mode == "Resize and Fill")
    assert np.array_equal(hint.shown, hint.first.pixels)


NARROW = {"image": encoded(Image.new("RGB", (8, 2048)))}


@pytest.mark.parametrize(
    ("task", "given"),
    [
        ("txt2img", {"unit": NARROW | {"module": "canny", "processor_res": 2048}}),
        ("txt2img", {"unit": NARROW, "width": 4096}),
        ("img2img", {"init_images": [NARROW["image"]], "resize_mode": 1, "width": 4096}),
    ],
)
def test_a_small_picture_that_would_take_all_memory_fails_its_job_with_the_reason(task: str, given: Any) -> None:
    with pytest.raises(JobError, match=r"so long and narrow that it would be scaled to \d+x\d+ pixels; at most"):
        canvas_of(task, **given)


def test_lines_stay_black_and_white_at_any_size() -> None:
    drawing = Image.new("L", (256, 256))
    drawing.paste(255, (100, 0, 130, 256))
    hint = hint_of(unit={"image": encoded(drawing)}, enable_hr=True, hr_scale=3)
    assert hint.first is not None
    assert hint.second is not None
    assert hint.second.pixels.shape == (192, 192, 3)
    for found in (hint.first, hint.second):
        assert set(np.unique(found.pixels)) == {0, 255}


def test_a_module_prepares_it_at_its_resolution_or_at_the_jobs() -> None:
    own = hint_of(unit={"module": "canny", "processor_res": 64, "image": encoded(noise(256, 256))})
    perfect = hint_of(unit={"module": "canny", "pixel_perfect": True, "image": encoded(noise(256, 256))})
    other = hint_of(unit={"module": "canny", "processor_res": 256, "image": encoded(noise(256, 256))})
    assert np.array_equal(own.shown, perfect.shown)
    assert not np.array_equal(own.shown, other.shown)


def test_a_shuffle_follows_from_what_the_job_asks_for_alone() -> None:
    def shuffled(job_id: str = "job", **fields: Any) -> Any:
        return hint_of(unit={"module": "shuffle", "image": encoded(noise())}, job_id=job_id, **fields).shown

    assert np.array_equal(shuffled(), shuffled("another job"))
    assert not np.array_equal(shuffled(), shuffled(seed=4))
    assert not np.array_equal(shuffled(), shuffled(subseed=5, subseed_strength=0.1))


def test_each_pass_has_it_unless_the_unit_is_for_one() -> None:
    for option, has in (("Both", (True, True)), ("Low res only", (True, False)), ("High res only", (False, True))):
        hint = hint_of(unit={"hr_option": option}, enable_hr=True)
        assert (hint.first is not None, hint.second is not None) == has
    assert hint_of(unit={"hr_option": "High res only"}).first is not None


def test_what_is_to_be_painted_is_minus_one_for_the_modules_of_inpainting() -> None:
    hint = hint_of(unit={"module": "inpaint", "image": encoded(noise()), "mask": encoded(mask((0, 0, 32, 64)))})
    assert hint.first is not None
    values = hint.first.values
    assert (values[:, :, :32] == -1).all()
    assert np.allclose(values[:, :, 32:], np.asarray(noise()).transpose(2, 0, 1)[:, :, 32:] / 255, atol=1e-6)
    assert not hint.shown[:, :32].any()


@pytest.mark.parametrize("option", ["Both", "Low res only", "High res only"])
def test_what_inpaint_only_keeps_has_the_size_of_the_picture_in_whichever_pass_it_has_a_say(option: str) -> None:
    unit = {"module": "inpaint_only", "image": encoded(noise()), "mask": encoded(mask((0, 0, 32, 64)))}
    canvas = canvas_of(unit=unit | {"hr_option": option}, enable_hr=True, hr_scale=2)
    painted = np.zeros((128, 128, 3), np.uint8)
    finished = canvas.finished(painted, 0)
    assert np.array_equal(finished[:, :48], painted[:, :48])
    assert finished[:, -48:].any()


def test_for_other_modules_a_mask_is_what_they_look_at() -> None:
    drawn = hint_of(unit={"module": "canny", "mask": encoded(mask((16, 16, 32, 32)))})
    assert np.array_equal(drawn.shown[..., 0], np.asarray(mask((16, 16, 32, 32))))
    for colour in (0, 255):  # the extension's way to send none
        none = encoded(Image.new("L", (64, 64), colour))
        assert np.array_equal(hint_of(unit={"mask": none}).shown, hint_of().shown)


def test_img2img_lends_its_picture_its_mask_and_the_part_that_is_painted() -> None:
    image = noise(128, 128)
    fields = {"init_images": [encoded(image)], "mask": encoded(mask((32, 32, 96, 96), 128, 128)), "mask_blur": 0}
    whole = hint_of("img2img", {"image": None}, **fields, inpaint_full_res=False)
    assert np.abs(whole.shown.astype(int) - np.asarray(image.resize((64, 64)))).mean() < 3
    part = hint_of("img2img", {"image": None}, **fields, inpaint_full_res=True)
    assert np.abs(part.shown.astype(int) - np.asarray(image.crop((32, 32, 96, 96)))).max() <= 1
    painted = hint_of("img2img", {"module": "inpaint_only", "image": None}, **fields, inpaint_full_res=False)
    assert painted.module == "inpaint"  # img2img keeps the rest by itself
    assert painted.first is not None
    assert painted.first.mask is not None
    assert painted.first.mask.mean() == pytest.approx(0.25)


def test_a_damaged_picture_is_named() -> None:
    image = encoded(noise())
    request = check("txt2img", {"alwayson_scripts": {"controlnet": {"args": [{"model": "x", "image": image}]}}}, "job")
    broken = request.model_copy(
        update={"controlnet": [request.controlnet[0].model_copy(update={"image": image[:200]})]}  # type: ignore[attr-defined]
    )
    with pytest.raises(Damaged, match="controlnet unit 0: image is"):
        prepared(broken)  # type: ignore[arg-type]
