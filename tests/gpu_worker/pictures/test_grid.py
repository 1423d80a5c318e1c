"""Grids: where pictures and texts are."""

import numpy as np
from PIL import Image

from gpu_worker.pictures.grid import drawn
from services.common.payloads.plots import Axis, Plot

COLOURS = ["red", "green", "blue", "yellow", "magenta", "cyan", "maroon", "navy"]
CELLS = [Image.new("RGB", (64, 48), colour) for colour in COLOURS]
PLOT = Plot(
    x=Axis(name="Steps", values=[1, 2]),
    y=Axis(name="Seed", values=[3, 4]),
    z=Axis(name="Sampler", values=["Euler", "DDIM"]),
)


def test_without_a_legend_it_is_the_pictures_beside_and_below_each_other() -> None:
    (whole,) = drawn(PLOT.model_copy(update={"draw_legend": False, "margin_size": 4}), CELLS)
    sub_grid = 2 * 64 + 4, 2 * 48 + 4
    assert whole.size == (2 * sub_grid[0] + 4, sub_grid[1])
    for index, cell in enumerate(CELLS):
        x, y, z = index % 2, index // 2 % 2, index // 4
        place = z * (sub_grid[0] + 4) + x * 68 + 32, y * 52 + 24
        assert whole.getpixel(place) == cell.getpixel((0, 0))
    assert whole.getpixel((65, 10)) == (255, 255, 255)


def test_texts_stand_above_the_columns_and_before_the_rows() -> None:
    whole, first, second, *cells = drawn(
        PLOT.model_copy(update={"include_sub_grids": True, "include_lone_images": True}), CELLS
    )
    assert cells == CELLS
    assert first.size == second.size
    assert whole.width == 2 * first.width
    assert whole.height > first.height
    left, top = first.width - 2 * 64, first.height - 2 * 48
    pixels = np.asarray(first)
    assert (pixels[top:, left:].reshape(-1, 3) == np.asarray(CELLS[0])[0, 0]).all(1).any()
    ink = pixels.min(2) < 100
    for part in (
        ink[:top, left : left + 64],
        ink[:top, left + 64 :],
        ink[top : top + 48, :left],
        ink[top + 48 :, :left],
    ):
        assert part.any()
    assert not ink[:top, :left].any()


def test_axes_without_a_name_leave_no_room() -> None:
    plot = Plot(x=Axis(name="Steps", values=[1, 2]))
    (whole,) = drawn(plot, CELLS[:2])
    assert whole.width == 128
    assert whole.height > 48
