"""The grids of an x/y/z plot: its pictures beside and below each other, with what is written at their edges."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from services.common.payloads.plots import Plot

_GROUND, _INK = "white", "black"
_LETTER_WIDTH = 0.55  # of a letter's height
_LINE_HEIGHT = 1.3


def drawn(plot: Plot, cells: Sequence[Image.Image]) -> list[Image.Image]:
    """The pictures of a plot's result, from those of its cells: the whole, and what it asks for beside that."""
    width, height = len(plot.x.values), len(plot.y.values)
    xs, ys, zs = (axis.labels if plot.draw_legend else [] for axis in (plot.x, plot.y, plot.z))
    sub_grids = []
    for start in range(0, len(cells), width * height):
        rows = [cells[start + row * width : start + (row + 1) * width] for row in range(height)]
        sub_grids.append(_laid_out(rows, xs, ys, plot.margin_size))
    whole = _laid_out([sub_grids], zs, [], plot.margin_size)
    return [
        whole,
        *(sub_grids if plot.include_sub_grids else ()),
        *(cells if plot.include_lone_images else ()),
    ]


def _laid_out(rows: Sequence[Sequence[Image.Image]], xs: Sequence[str], ys: Sequence[str], margin: int) -> Image.Image:
    """Pictures of one size in rows, with texts above the columns and before the rows where there are any."""
    width, height = rows[0][0].size
    font_size = max(8, min((width + height) // 25, 64))
    left = width * 3 // 4 if any(ys) else 0
    columns = [_wrapped(text, width, font_size) for text in xs]
    top = int(max(len(lines) for lines in columns) * font_size * _LINE_HEIGHT + font_size) if any(xs) else 0
    whole = Image.new(
        "RGB",
        (left + len(rows[0]) * (width + margin) - margin, top + len(rows) * (height + margin) - margin),
        _GROUND,
    )
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            whole.paste(picture, (left + column * (width + margin), top + row * (height + margin)))
    if top:
        for column, lines in enumerate(columns):
            _write(whole, lines, (left + column * (width + margin) + width // 2, top // 2), font_size)
    if left:
        for row, text in enumerate(ys):
            centre = left // 2, top + row * (height + margin) + height // 2
            _write(whole, _wrapped(text, left, font_size), centre, font_size)
    return whole


def _wrapped(text: str, width: int, font_size: int) -> list[str]:
    return textwrap.wrap(text, max(4, int(width / (font_size * _LETTER_WIDTH)))) or [""]


def _write(image: Image.Image, lines: list[str], centre: tuple[int, int], font_size: int) -> None:
    font = ImageFont.load_default(font_size)
    ImageDraw.Draw(image).multiline_text(centre, "\n".join(lines), _INK, font, anchor="mm", align="center")
