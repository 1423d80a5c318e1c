"""Examines a checkpoint: a table of what is right, and a page of pictures with their prompts."""

from __future__ import annotations

import asyncio
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from gpu_worker.demo_model import SIDE
from gpu_worker.demo_model.exam import Question, dressed_up, examine, marks, questions
from gpu_worker.demo_model.scenes import Pixels

_COLUMNS, _ROWS, _ZOOM = 6, 5, 2  # of the page
_GAP, _LINE, _NUM_LINES, _LINE_LETTERS = 12, 11, 4, 24  # its texts: pixels, and letters


def make(checkpoint: Path, device: str, num_threads: int) -> None:
    """Prints the table and writes the page beside the checkpoint."""
    plain = questions()
    papers = {"plain": plain, "dressed up": dressed_up(plain)}
    answers = asyncio.run(examine(checkpoint, device, num_threads, papers))
    table = Table(title="Pictures that are right")
    for column in ("prompts", "all", "ground", "colour", "shape", "size", "place", "overlap"):
        table.add_column(column, justify="left" if column == "prompts" else "right")
    for name, paper in papers.items():
        found = marks(paper, answers[name])
        counts = (str(count) for count in (found.right, found.ground, found.colour, found.shape))
        where_named = (f"{found.size}/{found.num_sizes}", f"{found.place}/{found.num_places}")
        table.add_row(f"{found.num_questions} {name}", *counts, *where_named, f"{found.overlap:.2f}")
    Console().print(table)
    number = _COLUMNS * _ROWS // len(papers)
    page = [
        answered for name, paper in papers.items() for answered in list(zip(paper, answers[name], strict=True))[:number]
    ]
    samples(page).save(checkpoint.with_suffix(".png"), optimize=True)


def samples(answered: list[tuple[Question, Pixels]]) -> Image.Image:
    """A page of pictures, each with its prompt below it."""
    side = SIDE * _ZOOM
    width, height = side + _GAP, side + _LINE * _NUM_LINES + _GAP
    page = Image.new("RGB", (_COLUMNS * width + _GAP, _ROWS * height + _GAP), "white")
    pen = ImageDraw.Draw(page)
    for index, (question, pixels) in enumerate(answered):
        left, top = _GAP + index % _COLUMNS * width, _GAP + index // _COLUMNS * height
        page.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), (left, top))
        lines = textwrap.wrap(question.prompt, _LINE_LETTERS, max_lines=_NUM_LINES, placeholder=" …")
        pen.multiline_text((left, top + side + 2), "\n".join(lines), fill="black", font_size=9, spacing=1)
    return page
