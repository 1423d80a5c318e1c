"""Upscaling by resampling and GrabCut."""

from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from gpu_worker.pictures.extras import decoded, retouched
from services.common.payloads import Edit, check
from tests.pictures import encoded, noise

LANCZOS, NEAREST = Image.Resampling.LANCZOS, Image.Resampling.NEAREST


def edited(task_type: str, **fields: Any) -> Image.Image:
    request = check(task_type, fields, "job")
    assert isinstance(request, Edit)
    (image,) = retouched(request, decoded(request), [])
    return image


def same(found: Image.Image, expected: Image.Image) -> bool:
    return found.size == expected.size and np.array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize(("name", "resampling"), [("Lanczos", LANCZOS), ("Nearest", NEAREST)])
def test_a_picture_is_made_larger_by_a_factor_or_to_a_size(name: str, resampling: Image.Resampling) -> None:
    image = noise(64, 48)
    found = edited("extra-single-image", image=encoded(image), upscaler_1=name, upscaling_resize=1.5)
    assert same(found, image.resize((96, 72), resampling))
    size = {"resize_mode": 1, "upscaling_resize_w": 96, "upscaling_resize_h": 96}
    found = edited("extra-single-image", image=encoded(image), upscaler_1=name, **size)
    assert same(found, image.resize((128, 96), resampling).crop((16, 0, 112, 96)))
    found = edited("extra-single-image", image=encoded(image), upscaler_1=name, upscaling_crop=False, **size)
    assert found.size == (128, 96)


def test_a_picture_fills_a_size_that_is_no_multiple_of_8() -> None:
    white = Image.new("RGB", (100, 50), "white")
    size = {"resize_mode": 1, "upscaling_resize_w": 500, "upscaling_resize_h": 250}
    found = edited("extra-single-image", image=encoded(white), upscaler_1="Nearest", **size)
    assert same(found, Image.new("RGB", (500, 250), "white"))


def test_two_upscalers_are_blended_and_none_leaves_the_picture() -> None:
    image = noise(64, 48)
    both = {"upscaler_1": "Lanczos", "upscaler_2": "Nearest", "extras_upscaler_2_visibility": 0.25}
    found = edited("extra-single-image", image=encoded(image), **both)
    one, other = image.resize((128, 96), LANCZOS), image.resize((128, 96), NEAREST)
    assert same(found, Image.blend(one, other, 0.25))
    assert same(edited("extra-single-image", image=encoded(image)), image)


def test_transparency_stays() -> None:
    image = noise(64, 48)
    image.putalpha(128)
    found = edited("extra-single-image", image=encoded(image), upscaler_1="Nearest")
    assert found.mode == "RGBA"
    assert set(found.getchannel("A").get_flattened_data()) == {128}


def test_an_object_is_cut_out_of_its_background() -> None:
    image = Image.new("RGB", (160, 120), (30, 90, 200))
    ImageDraw.Draw(image).ellipse((50, 30, 110, 90), (220, 40, 30))
    truth = Image.new("L", image.size)
    ImageDraw.Draw(truth).ellipse((50, 30, 110, 90), 255)
    found = edited("rembg", input_image=encoded(image), model="u2net")
    mask = edited("rembg", input_image=encoded(image), return_mask=True)
    assert found.mode == "RGBA"
    assert same(found.getchannel("A"), mask)
    one, other = np.asarray(mask) > 127, np.asarray(truth) > 127
    assert (one & other).sum() / (one | other).sum() > 0.95
    assert same(edited("rembg", input_image=encoded(image), return_mask=True), mask)


def test_a_picture_of_one_pixel_has_no_background() -> None:
    assert edited("rembg", input_image=encoded(Image.new("RGB", (1, 1))), return_mask=True).getpixel((0, 0)) == 255
