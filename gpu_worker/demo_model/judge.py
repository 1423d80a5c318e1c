"""Looks at a picture and says which scene it shows, by arithmetic alone: the other way round of `scenes.draw`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from gpu_worker.demo_model import SIDE
from gpu_worker.demo_model.scenes import COLOURS, DIRECTIONS, OUTLINES, RADII, Outline, Pixels, Scene, covered

Mask = NDArray[np.bool_]

_EDGE = 2  # pixels along the border, which are ground
_MIN_PIXELS = 60  # of a figure: half a small triangle
_MAX_STRAYS = 0.15  # pixels of other figures, in parts of the largest; pixels of the border that are not ground
_MAX_HOLES = 0.05  # in parts of the figure
_MIN_OVERLAP = 0.72  # intersection over union with a shape for a figure to be one; the points of small stars are soft
_CENTRED = 4.0  # pixels from the middle
_MIN_CONTRAST = 40.0  # between figure and ground, as a distance of RGB


@dataclass(frozen=True)
class Sight:
    """What was seen, and how well the figure covers its shape: intersection over union."""

    scene: Scene
    overlap: float


def see(pixels: Pixels) -> Sight | None:
    """The scene in pixels of shape (64, 64, 3); None where there is not exactly one figure of a known shape."""
    border = _border(pixels)
    ground = np.median(pixels[border], axis=0)
    figure = _figure(pixels, ground, border)
    if figure is None:
        return None
    overlaps = {shape: _overlap(figure, outline) for shape, outline in OUTLINES.items()}
    shape = max(overlaps, key=lambda name: overlaps[name])
    if overlaps[shape] < _MIN_OVERLAP:
        return None
    inner = ndimage.binary_erosion(figure)
    colour = np.median(pixels[inner], axis=0)
    size, position = _size(figure, OUTLINES[shape]), _position(figure)
    return Sight(Scene(shape, _name(colour), _name(ground), size, position), overlaps[shape])


def is_right(pixels: Pixels, scene: Scene) -> bool:
    """Whether the picture shows this shape in this colour on this ground, wherever and however large."""
    sight = see(pixels)
    return sight is not None and (sight.scene.shape, sight.scene.colour, sight.scene.ground) == (
        scene.shape,
        scene.colour,
        scene.ground,
    )


def _border(pixels: Pixels) -> Mask:
    border = np.ones(pixels.shape[:2], dtype=bool)
    border[_EDGE:-_EDGE, _EDGE:-_EDGE] = False
    return border


def _figure(pixels: Pixels, ground: NDArray[np.float64], border: Mask) -> Mask | None:
    """The pixels of the one thing that is not ground: nearer to its colour than to the ground's."""
    distance = np.linalg.norm(pixels - ground, axis=2)
    reach = np.percentile(distance, 98)
    is_other = distance > reach / 2
    if reach < _MIN_CONTRAST or is_other[border].mean() > _MAX_STRAYS:
        return None
    labels, num_figures = ndimage.label(is_other)
    counts = np.bincount(labels.ravel())[1:]
    if not num_figures or counts.max() < _MIN_PIXELS or counts.sum() - counts.max() > _MAX_STRAYS * counts.max():
        return None
    figure: Mask = labels == 1 + counts.argmax()
    num_filled = ndimage.binary_fill_holes(figure).sum()
    return figure if num_filled <= (1 + _MAX_HOLES) * figure.sum() else None


def _overlap(figure: Mask, outline: Outline) -> float:
    """Intersection over union of the figure and the outline, fitted to the figure's extent."""
    low, high = _extent(figure)
    extent = outline.max(0) - outline.min(0)
    scale = ((high - low) / extent).mean()
    fitted = covered(outline * scale + (low + high) / 2, figure.shape[0]) > 0.5
    return float((figure & fitted).sum() / (figure | fitted).sum())


def _extent(figure: Mask) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Left top and right bottom, in pixels."""
    rows, columns = (np.flatnonzero(figure.any(axis)) for axis in (1, 0))
    return np.array([columns[0], rows[0]], dtype=float), np.array([columns[-1] + 1, rows[-1] + 1], dtype=float)


def _size(figure: Mask, outline: Outline) -> str:
    """By area, which a missing point changes little."""
    x, y = outline.T
    unit_area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    radius = np.sqrt(figure.sum() / unit_area)
    return min(RADII, key=lambda name: abs(np.log(RADII[name] / radius)))


def _position(figure: Mask) -> str:
    """Where the middle of its extent is."""
    low, high = _extent(figure)
    offset = (low + high) / 2 - SIDE / 2
    if np.abs(offset).max() < _CENTRED:
        return "middle"
    return max(DIRECTIONS, key=lambda name: float(np.dot(DIRECTIONS[name], offset)))


def _name(colour: NDArray[np.float64]) -> str:
    """The name of the nearest colour."""
    return min(COLOURS, key=lambda name: float(np.linalg.norm(colour - np.array(COLOURS[name]))))
