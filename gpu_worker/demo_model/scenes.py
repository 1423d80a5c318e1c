"""What the demo model knows: one coloured shape on a ground of another colour. Draws such scenes, without torch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from gpu_worker.demo_model import SIDE

Pixels = NDArray[np.uint8]
Outline = NDArray[np.float64]


COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 215, 50),
    "orange": (245, 130, 25),
    "purple": (140, 50, 170),
    "white": (240, 240, 240),
    "black": (25, 25, 25),
}
RADII = {"small": 10.0, "medium": 13.5, "large": 18.5}  # pixels
DIRECTIONS = {"middle": (0, 0), "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
_OFFSET = 16.0  # pixels from the middle, or less where the shape would touch the edge
_MARGIN = 1.5
_OVERSAMPLING = 4
# How much a drawn scene differs from its words: colours in parts of 255, places in pixels, radii in parts of them.
_COLOUR_DEVIATION, _PLACE_JITTER, _RADIUS_JITTER = 11.0, 2.0, 0.06


def _regular(num_points: int, radii: tuple[float, ...] = (1.0,)) -> Outline:
    """Points at these distances in turn from a centre, the first on top; the origin is the middle of their extent."""
    angles = np.arange(num_points) * 2 * np.pi / num_points
    points = np.resize(radii, num_points)[:, None] * np.stack([np.sin(angles), -np.cos(angles)], 1)
    centred: Outline = points - (points.max(0) + points.min(0)) / 2
    return centred


# Polygons in units of the radius, about equally large to the eye.
OUTLINES: dict[str, Outline] = {
    "circle": _regular(48),
    "square": np.array([(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]) * 0.88,
    "triangle": _regular(3, (1.25,)),
    "star": _regular(10, (1.2, 0.55)),
}


@dataclass(frozen=True)
class Scene:
    """A picture in words: keys of the tables above."""

    shape: str
    colour: str
    ground: str
    size: str = "medium"
    position: str = "middle"


SCENES = tuple(
    Scene(shape, colour, ground, size, position)
    for shape, (colour, ground), size, position in itertools.product(
        OUTLINES, itertools.permutations(COLOURS, 2), RADII, DIRECTIONS
    )
)


def random_scene(rng: np.random.Generator) -> Scene:
    """Any scene, all equally likely."""
    return SCENES[rng.integers(len(SCENES))]


def draw(scene: Scene, rng: np.random.Generator | None = None) -> Pixels:
    """The scene as pixels of shape (64, 64, 3): as its words say to the point, or jittered by `rng`."""
    figure, ground = (np.array(COLOURS[name], dtype=float) for name in (scene.colour, scene.ground))
    radius, jitter = RADII[scene.size], np.zeros(2)
    if rng is not None:
        figure, ground = (colour + rng.normal(0, _COLOUR_DEVIATION, 3) for colour in (figure, ground))
        radius *= 1 + rng.uniform(-_RADIUS_JITTER, _RADIUS_JITTER)
        jitter = rng.uniform(-_PLACE_JITTER, _PLACE_JITTER, 2)
    outline = OUTLINES[scene.shape] * radius
    room = SIDE / 2 - _MARGIN - np.abs(outline).max()
    place = SIDE / 2 + np.clip(np.array(DIRECTIONS[scene.position]) * min(_OFFSET, room) + jitter, -room, room)
    inside = covered(outline + place)[:, :, None]
    pixels: Pixels = np.clip(ground + inside * (figure - ground), 0, 255).round().astype(np.uint8)
    return pixels


def covered(outline: Outline, side: int = SIDE) -> NDArray[np.float64]:
    """How much of each pixel of a square picture lies within an outline in pixels: 0..1, smooth at the edges."""
    image = Image.new("L", (side * _OVERSAMPLING, side * _OVERSAMPLING))
    # Pillow's coordinates are the middles of pixels.
    ImageDraw.Draw(image).polygon([tuple(point) for point in outline * _OVERSAMPLING - 0.5], fill=255)
    return np.asarray(image.resize((side, side), Image.Resampling.BOX), dtype=float) / 255
