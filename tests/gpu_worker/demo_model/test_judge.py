"""The judge of pictures, on pictures that were drawn: it sees what is there, and is not easily content."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from gpu_worker.demo_model import SIDE
from gpu_worker.demo_model.judge import is_right, see
from gpu_worker.demo_model.scenes import COLOURS, SCENES, Pixels, Scene, draw, random_scene

SCENE = Scene("circle", "red", "blue")


def seen(pixels: Pixels) -> Scene | None:
    sight = see(pixels)
    return None if sight is None else sight.scene


def test_scenes_are_seen_as_what_was_drawn() -> None:
    assert not [scene for scene in SCENES[::13] if seen(draw(scene)) != scene]


def test_scenes_are_seen_through_jitter_noise_and_blur() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = random_scene(rng)
        small = Image.fromarray(draw(scene, rng)).resize((48, 48), Image.Resampling.BILINEAR)
        blurred = np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BILINEAR), dtype=float)
        noisy = np.clip(blurred + rng.normal(0, 5, blurred.shape), 0, 255).astype(np.uint8)
        assert seen(noisy) == scene


@pytest.mark.parametrize(
    "other",
    [
        Scene("square", "red", "blue"),
        Scene("star", "red", "blue"),
        Scene("triangle", "red", "blue"),
        Scene("circle", "orange", "blue"),
        Scene("circle", "red", "purple"),
        Scene("circle", "blue", "red"),
    ],
    ids=lambda scene: f"{scene.colour} {scene.shape} on {scene.ground}",
)
def test_another_shape_colour_or_ground_is_wrong(other: Scene) -> None:
    assert is_right(draw(other), other)
    assert not is_right(draw(other), SCENE)


def test_size_and_place_are_free_where_the_scene_is_asked_for() -> None:
    assert is_right(draw(Scene("circle", "red", "blue", "small", "left")), SCENE)


def painted(*shapes: tuple[str, tuple[int, ...], str], ground: str = "blue") -> Pixels:
    """Ellipses and rectangles on a ground."""
    image = Image.new("RGB", (SIDE, SIDE), COLOURS[ground])
    for kind, box, colour in shapes:
        getattr(ImageDraw.Draw(image), kind)(box, fill=COLOURS[colour])
    return np.asarray(image)


@pytest.mark.parametrize(
    "pixels",
    [
        painted(),
        painted(("ellipse", (8, 8, 28, 28), "red"), ("ellipse", (36, 36, 56, 56), "red")),
        painted(("ellipse", (8, 8, 28, 28), "red"), ("rectangle", (40, 40, 52, 52), "green")),
        painted(("rectangle", (26, 10, 38, 54), "red"), ("rectangle", (10, 26, 54, 38), "red")),
        painted(("ellipse", (4, 24, 60, 40), "red")),
        painted(("ellipse", (30, 30, 33, 33), "red")),
        painted(("ellipse", (12, 12, 52, 52), "red"), ("ellipse", (22, 22, 42, 42), "blue")),
        np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8),
    ],
    ids=["nothing", "two circles", "two kinds", "a cross", "an ellipse", "a dot", "a ring", "noise"],
)
def test_what_is_not_one_figure_of_a_known_shape_is_not_seen_as_one(pixels: Pixels) -> None:
    assert see(pixels) is None
