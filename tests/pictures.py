"""Owns the pictures that tests send: of noise, of one colour, and masks of rectangles, as base64."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image


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
