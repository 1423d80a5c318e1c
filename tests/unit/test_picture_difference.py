"""How far two pictures are from each other, by the formulas."""

import math

import numpy as np
import pytest
from PIL import Image

from deploy.local.verify import difference


def test_equal_pictures_have_no_distance() -> None:
    image = Image.new("RGB", (8, 8), (1, 2, 3))
    found = difference(image, image.copy())
    assert (found.largest, found.num_pixels, found.share, found.psnr) == (0, 0, 0.0, math.inf)


def test_pixels_that_differ_are_counted_and_weighed() -> None:
    before = np.full((8, 16, 3), 100, np.uint8)
    after = before.copy()
    after[0, 0] = 110, 100, 95
    after[5, 5, 2] = 101
    found = difference(Image.fromarray(before), Image.fromarray(after))
    mean_square = (10**2 + 5**2 + 1) / (8 * 16 * 3)
    assert (found.largest, found.num_pixels, found.share) == (10, 2, 2 / 128)
    assert found.psnr == pytest.approx(10 * math.log10(255**2 / mean_square))
