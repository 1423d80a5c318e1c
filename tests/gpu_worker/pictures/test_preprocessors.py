"""Each module that needs no weights, on pictures whose result is known."""

import cv2
import numpy as np
import pytest

from gpu_worker.pictures.preprocessors import MODULES, prepared
from services.common.payloads.controlnet import PREPROCESSORS
from tests.pictures import noise

PICTURE = np.asarray(noise(96, 64, seed=2))
SQUARE = np.zeros((64, 64, 3), np.uint8)
SQUARE[16:48, 16:48] = 255


def run(module: str, pixels: np.ndarray = PICTURE, a: float = 0, b: float = 0, seed: int = 1) -> np.ndarray:
    return prepared(module, pixels, min(pixels.shape[:2]), a, b, seed)


def test_all_modules_of_the_payload_are_there_and_make_pictures() -> None:
    assert set(PREPROCESSORS) == MODULES
    for name, preprocessor in PREPROCESSORS.items():
        found = run(name, a=preprocessor.value(0, None), b=preprocessor.value(1, None))
        assert (found.dtype, found.shape) == (np.uint8, (64, 96, 3)), name


def test_canny_is_opencvs_on_the_picture_at_its_resolution() -> None:
    small = cv2.resize(PICTURE, (48, 32), interpolation=cv2.INTER_AREA)
    found = prepared("canny", PICTURE, 32, 100, 200, 0)
    assert np.array_equal(found[..., 0], cv2.Canny(small, 100, 200))
    edges = run("canny", SQUARE, 100, 200)[..., 1]
    assert set(np.unique(edges)) == {0, 255}
    assert 4 * 30 <= (edges > 0).sum() <= 4 * 36


def test_invert_threshold_and_colour() -> None:
    assert np.array_equal(run("invert"), 255 - PICTURE)
    assert np.array_equal(run("threshold", a=100)[..., 0], np.where(PICTURE.min(2) > 100, 255, 0))
    assert len(np.unique(run("color").reshape(-1, 3), axis=0)) == 1


@pytest.mark.parametrize("module", ["lineart_standard", "scribble_xdog"])
def test_dark_lines_become_white_and_the_ground_black(module: str) -> None:
    drawing = np.full((64, 64, 3), 255, np.uint8)
    drawing[31:33] = 0
    found = run(module, drawing, a=32)[..., 0]
    assert found[31:33].min() > 100
    assert found[:20].max() == 0


def test_blur_and_tile_take_details_away() -> None:
    blurred = run("blur_gaussian", a=9)
    assert np.array_equal(blurred, cv2.GaussianBlur(PICTURE, (0, 0), 9.0))
    assert run("tile_resample", a=1).shape == (64, 96, 3)
    assert run("tile_resample", a=2).shape == (32, 48, 3)


def test_recoloring_keeps_lightness_bent_by_gamma() -> None:
    grey = np.full((64, 64, 3), 128, np.uint8)
    assert abs(int(run("recolor_intensity", grey, 1)[0, 0, 0]) - 128) <= 1
    assert abs(int(run("recolor_intensity", grey, 2)[0, 0, 0]) - 64) <= 1
    assert run("recolor_luminance", np.full((64, 64, 3), 255, np.uint8), 1).min() == 255
    assert np.ptp(run("recolor_luminance", a=1), axis=2).max() == 0


def test_a_shuffle_has_the_pictures_colours_elsewhere_and_repeats() -> None:
    found = run("shuffle")
    assert np.array_equal(found, run("shuffle"))
    assert not np.array_equal(found, run("shuffle", seed=2))
    assert not np.array_equal(found, PICTURE)
    assert found.min() >= PICTURE.min()
    assert found.max() <= PICTURE.max()
