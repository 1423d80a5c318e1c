"""Pictures and masks on their way to the job's size and back."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from gpu_worker.pictures.canvas import Canvas, prepared, resized
from services.common.payloads import Img2Img, check
from tests.pictures import encoded, mask, noise


def canvas(**fields: Any) -> Canvas:
    small = {"init_images": [encoded(noise())], "width": 64, "height": 64, "mask_blur": 0}
    request = check("img2img", small | fields, "job")
    assert isinstance(request, Img2Img)
    return prepared(request)


def columns(*colours: int) -> Image.Image:
    """A picture of grey columns, 32 pixels each, 32 high."""
    row = np.repeat(np.array(colours, dtype=np.uint8), 32)
    return Image.fromarray(np.tile(row, (32, 1))).convert("RGB")


def test_the_picture_is_stretched_cut_or_filled_up() -> None:
    image = columns(0, 100, 200)  # 96x32
    stretched, cut, filled = (np.asarray(resized(image, mode, 64, 64))[..., 0] for mode in (0, 1, 2))
    assert stretched.shape == cut.shape == filled.shape == (64, 64)
    assert list(stretched[5, [2, 32, 62]]) == [0, 100, 200]
    assert (cut[:, 8:56] == 100).all()  # the middle third, twice as large
    assert list(filled[32, [2, 32, 62]]) == [0, 100, 200]
    assert (filled == filled[32]).all()  # above and below, the nearest row goes on


@pytest.mark.parametrize("size", [(64, 64), (128, 64), (64, 200), (72, 104)])
@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_every_mode_gives_the_size(mode: int, size: tuple[int, int]) -> None:
    assert resized(noise(97, 61), mode, *size).size == size


def test_what_is_transparent_is_white() -> None:
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    image.putpixel((3, 3), (255, 0, 0, 255))
    found = canvas(init_images=[encoded(image)]).pictures[0]
    assert list(found[3, 3]) == [255, 0, 0]
    assert list(found[9, 9]) == [255, 255, 255]


def test_a_mask_may_be_white_on_black_or_drawn_on_nothing_or_inverted() -> None:
    drawn = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    drawn.paste((10, 20, 30, 255), (16, 8, 48, 40))
    plain = canvas(mask=encoded(mask((16, 8, 48, 40))), inpaint_full_res=False)
    assert plain.mask is not None
    assert plain.mask.sum() == 32 * 32
    assert np.array_equal(plain.mask, canvas(mask=encoded(drawn), inpaint_full_res=False).mask)
    other = canvas(mask=encoded(mask((16, 8, 48, 40))), inpaint_full_res=False, inpainting_mask_invert=1)
    assert np.array_equal(other.mask, 1 - plain.mask)
    assert plain.latent_mask.shape == (8, 8)
    assert plain.latent_mask[1:5, 2:6].all()
    assert plain.latent_mask.sum() == 16


def test_the_edge_of_a_mask_is_blurred_as_by_a_gaussian() -> None:
    found = canvas(mask=encoded(mask((0, 0, 32, 64))), mask_blur=4, inpaint_full_res=False)
    assert found.mask is not None
    kernel = np.exp(-0.5 * (np.arange(-10, 11) / 4) ** 2)
    kernel /= kernel.sum()
    expected = np.convolve((np.arange(-32, 96) < 32).astype(float), kernel, "same")[32:96]
    assert np.abs(found.mask[32, 10:] - expected[10:]).max() <= 1 / 255


def test_only_the_masked_part_is_enlarged_and_put_back_where_it_was() -> None:
    image = noise(256, 128, seed=3)
    painted = canvas(
        init_images=[encoded(image)],
        mask=encoded(mask((100, 50, 116, 58), 256, 128)),
        inpaint_full_res_padding=8,
        inpainting_fill=1,
    )
    assert painted.box is not None
    left, top, right, bottom = painted.box
    assert (right - left, bottom - top) == (32, 32)  # 16 and twice the padding, and as high as the job is
    assert left <= 92 <= right
    assert top <= 42
    assert bottom >= 66
    expected = image.crop(painted.box).resize((64, 64), Image.Resampling.LANCZOS)
    assert np.array_equal(painted.pictures[0], np.asarray(expected))
    red = np.zeros((64, 64, 3), dtype=np.uint8)
    red[..., 0] = 255
    found = painted.finished(red, 0).copy()
    assert found.shape == (128, 256, 3)
    assert (found[50:58, 100:116] == [255, 0, 0]).all()
    found[50:58, 100:116] = np.asarray(image)[50:58, 100:116]
    assert np.array_equal(found, np.asarray(image))


def test_the_part_of_a_picture_of_another_size_is_put_back_where_it_was_too() -> None:
    images = [noise(), noise(128, 256)]
    given = {"init_images": [encoded(image) for image in images], "mask": encoded(mask((0, 0, 16, 16)))}
    painted = canvas(**given, inpainting_fill=1)
    assert painted.box == (0, 0, 16, 16)
    assert np.array_equal(
        painted.pictures[1],
        np.asarray(images[1].resize((64, 64)).crop((0, 0, 16, 16)).resize((64, 64), Image.Resampling.LANCZOS)),
    )
    found = painted.finished(np.full((64, 64, 3), 255, dtype=np.uint8), 1)
    expected = images[1].copy()
    expected.paste("white", (0, 0, 32, 64))
    assert np.array_equal(found[:60, :30], np.asarray(expected)[:60, :30])
    assert np.array_equal(found[68:, 34:], np.asarray(expected)[68:, 34:])


def test_a_part_at_the_pictures_edge_stays_within_it() -> None:
    found = canvas(init_images=[encoded(noise(100, 40))], mask=encoded(mask((90, 0, 100, 40), 100, 40)))
    assert found.box == (60, 0, 100, 40)


def test_an_empty_mask_leaves_the_picture_as_it_is() -> None:
    empty = canvas(mask=encoded(Image.new("L", (64, 64))))
    assert empty.box is None
    assert np.array_equal(empty.finished(np.zeros((64, 64, 3), dtype=np.uint8), 0), np.asarray(noise()))


def test_a_masked_part_is_filled_with_the_colours_around_it() -> None:
    image = Image.new("RGB", (64, 64), (0, 200, 0))
    image.paste((255, 0, 0), (20, 20, 40, 40))
    found = canvas(init_images=[encoded(image)], mask=encoded(mask((20, 20, 40, 40))), inpaint_full_res=False)
    assert np.abs(found.pictures[0].astype(int) - [0, 200, 0]).max() <= 8
