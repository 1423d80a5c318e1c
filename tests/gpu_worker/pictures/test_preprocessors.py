"""Each module that needs no weights, on pictures whose result is known: by geometry, a formula, or SciPy's filters."""

from statistics import NormalDist

import cv2
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from gpu_worker.pictures.preprocessors import MODULES, prepared
from services.common.payloads.controlnet import PREPROCESSORS
from tests.pictures import noise

PICTURE = np.asarray(noise(96, 64, seed=2))
SQUARE = np.zeros((64, 64, 3), np.uint8)
SQUARE[16:48, 16:48] = 255
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def run(module: str, pixels: np.ndarray = PICTURE, a: float = 0, b: float = 0, seed: int = 1) -> np.ndarray:
    return prepared(module, pixels, min(pixels.shape[:2]), a, b, seed)


def test_all_modules_of_the_payload_are_there_and_make_pictures() -> None:
    assert set(PREPROCESSORS) == MODULES
    for name, preprocessor in PREPROCESSORS.items():
        found = run(name, a=preprocessor.value(0, None), b=preprocessor.value(1, None))
        assert (found.dtype, found.shape) == (np.uint8, (64, 96, 3)), name


@pytest.mark.parametrize("module", ["none", "inpaint", "inpaint_only", "tile_colorfix"])
def test_what_is_looked_at_as_it_is_stays_bit_for_bit(module: str) -> None:
    assert np.array_equal(run(module), PICTURE)


def test_canny_is_opencvs_on_the_picture_at_its_resolution() -> None:
    small = cv2.resize(PICTURE, (48, 32), interpolation=cv2.INTER_AREA)
    found = prepared("canny", PICTURE, 32, 100, 200, 0)
    assert np.array_equal(found[..., 0], cv2.Canny(small, 100, 200))


def test_the_edges_of_a_square_are_lines_of_a_pixel_around_it() -> None:
    edges = run("canny", SQUARE, 100, 200)
    assert set(np.unique(edges)) == {0, 255}
    lines = edges[..., 0] > 0
    for line in (lines[20:44, 13:19], lines[20:44, 45:51], lines[13:19, 20:44].T, lines[45:51, 20:44].T):
        assert (line.sum(axis=1) == 1).all()  # across each side
    assert not lines[19:45, 19:45].any()
    assert not lines[:13].any()


def test_invert_and_threshold_are_their_formulas() -> None:
    assert np.array_equal(run("invert"), 255 - PICTURE.astype(int))
    colours = np.array([[RED, (101, 102, 103), (100, 255, 255), (255, 255, 255)]], np.uint8)
    found = run("threshold", colours.repeat(4, axis=0), a=100)
    assert found[0, :, 0].tolist() == [0, 255, 0, 255]  # white is what no colour of is too dark
    assert np.array_equal(run("threshold", a=100)[..., 0], np.where((PICTURE > 100).all(2), 255, 0))


def test_colours_become_one_for_each_block_of_64_pixels() -> None:
    blocks = np.array([[RED, GREEN, BLUE], [BLUE, RED, GREEN]], np.uint8)
    flag = blocks.repeat(64, axis=0).repeat(64, axis=1)
    assert np.array_equal(run("color", flag), flag)
    found = run("color", np.asarray(noise(192, 128, seed=2)))
    assert np.array_equal(found, found[32::64, 32::64].repeat(64, axis=0).repeat(64, axis=1))
    assert len(np.unique(run("color").reshape(-1, 3), axis=0)) == 1


def test_lines_become_as_light_as_they_were_darker_than_their_ground() -> None:
    """Black ones grey: the middle of what is found is 127, and a line that is half as dark is half as light."""
    drawing = np.full((64, 256, 3), 255, np.uint8)
    drawing[:, [48, 128]] = 0
    drawing[:, 208] = 255 - 102
    found = run("lineart_standard", drawing)
    expected = np.zeros_like(drawing)
    expected[:, [48, 128]] = 127
    expected[:, 208] = 127 * 102 // 255
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_lines_are_what_is_darker_than_around_it() -> None:
    x = PICTURE.astype(float)
    darker = (gaussian_filter(x, (6, 6, 0), mode="mirror", truncate=4) - x).min(axis=2).clip(0)
    expected = darker / np.median(darker[darker > 8]) * 127
    assert np.abs(run("lineart_standard")[..., 0] - expected.clip(max=255)).max() <= 1


@pytest.mark.parametrize("threshold", [16, 32, 64])
def test_scribbles_are_where_a_fine_blur_is_darker_than_a_coarse_one(threshold: int) -> None:
    fine, coarse = (
        gaussian_filter(PICTURE.astype(float), (sigma, sigma, 0), mode="mirror", truncate=4) for sigma in (0.5, 5.0)
    )
    darker = (coarse - fine).min(axis=2)
    is_clear = np.abs(darker - threshold / 2) > 1.01  # a whole number is what counts, and rounding may be either
    found = run("scribble_xdog", a=threshold)[..., 0]
    assert set(np.unique(found)) == {0, 255}
    assert np.array_equal(found[is_clear] == 255, darker[is_clear] > threshold / 2)
    assert is_clear.mean() > 0.9


def test_an_edge_is_blurred_as_the_normal_distribution_says() -> None:
    edge = np.zeros((64, 128, 3), np.uint8)
    edge[:, 64:] = 255
    blurred = run("blur_gaussian", edge, a=9)
    normal = NormalDist(63.5, 9)
    assert np.abs(blurred - 255 * np.array([normal.cdf(x) for x in range(128)])[None, :, None]).max() <= 2
    assert (blurred == blurred[:1, :, :1]).all()


def test_a_tile_is_the_mean_of_what_becomes_one_pixel() -> None:
    assert np.array_equal(run("tile_resample", a=1), PICTURE)
    for rate in (2, 4):
        means = PICTURE.reshape(64 // rate, rate, 96 // rate, rate, 3).mean(axis=(1, 3))
        assert np.abs(run("tile_resample", a=rate) - means).max() <= 1


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_recoloring_keeps_a_lightness_bent_by_gamma(gamma: float) -> None:
    """Intensity is the largest of the colours, luminance CIE's L*, of sRGB with its white of D65."""
    colours = np.array([[RED, GREEN, BLUE, (128, 128, 128), (200, 100, 50), (255, 255, 255), (0, 0, 0)]], np.uint8)
    pixels = colours.repeat(8, axis=0)
    share = colours[0] / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    lightness = np.where(luminance > 0.008856, 1.16 * np.cbrt(luminance) - 0.16, 9.033 * luminance)
    for module, expected in (("recolor_intensity", share.max(axis=1)), ("recolor_luminance", lightness)):
        found = run(module, pixels, a=gamma)
        assert (np.ptp(found, axis=2) == 0).all()
        # It is bent after it was rounded, and rounded again.
        assert np.abs(found[0, :, 0] - 255 * expected**gamma).max() <= 2, module


def test_a_shuffle_draws_colours_from_places_that_wander_over_the_whole_picture() -> None:
    """Of a picture whose colours say where they are."""
    x, y = np.meshgrid(np.arange(256), np.arange(256))
    places = np.stack([x, y, np.zeros_like(x)], axis=2).astype(np.uint8)
    found = run("shuffle", places)
    assert np.array_equal(found, run("shuffle", places))
    assert not np.array_equal(found, run("shuffle", places, seed=2))
    for axis in (0, 1):
        assert (found[..., axis].min(), found[..., axis].max()) == (0, 255)
        for direction in (0, 1):  # neighbours come from nearby
            assert np.abs(np.diff(found[..., axis].astype(int), axis=direction)).max() < 16
    assert not found[..., 2].any()
    plain = np.full((64, 64, 3), (10, 20, 30), np.uint8)
    assert np.array_equal(run("shuffle", plain), plain)
