"""Owns the pictures that tests send: noise and masks of rectangles, as base64; circles, as files of a dataset."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image, ImageDraw


def encoded(image: Image.Image, **options: Any) -> str:
    """As PNG in base64."""
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return base64.b64encode(file.getvalue()).decode()


def noise(width: int = 64, height: int = 64, seed: int = 0) -> Image.Image:
    """Smooth noise."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def mask(box: tuple[int, int, int, int], width: int = 64, height: int = 64) -> Image.Image:
    """White within the box."""
    image = Image.new("L", (width, height))
    image.paste(255, box)
    return image


def circle(shade: int) -> bytes:
    """A circle on a coloured ground, as PNG."""
    image = Image.new("RGB", (64, 64), (200, shade, 40))
    ImageDraw.Draw(image).ellipse((8, 8, 40, 40), fill=(0, 255, shade))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
