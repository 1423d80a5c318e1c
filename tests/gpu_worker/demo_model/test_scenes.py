"""The data recipe: what is drawn for a scene, and how it is put into words."""

import re

import numpy as np
import pytest

from gpu_worker.demo_model import SIDE
from gpu_worker.demo_model.captions import BEGINNINGS, BLAME, PRAISE, caption, dressed, nothing, worded
from gpu_worker.demo_model.scenes import COLOURS, OUTLINES, SCENES, Scene, covered, draw, random_scene

SCENE = Scene("star", "orange", "blue", "small", "left")


def test_the_same_seed_draws_the_same_pictures_with_the_same_captions() -> None:
    def recipe(seed: int) -> list[tuple[str, bytes]]:
        rng = np.random.default_rng(seed)
        scenes = [random_scene(rng) for _ in range(20)]
        return [(caption(scene, rng), draw(scene, rng).tobytes()) for scene in scenes]

    assert recipe(1) == recipe(1)
    assert recipe(1) != recipe(2)


def test_there_is_a_scene_for_every_combination_of_two_different_colours() -> None:
    assert len(set(SCENES)) == len(SCENES) == 4 * 8 * 7 * 3 * 5
    assert not [scene for scene in SCENES if scene.colour == scene.ground]


def test_without_chance_a_scene_is_drawn_as_its_words_say() -> None:
    pixels = draw(Scene("square", "red", "white", "medium", "bottom"))
    assert pixels.shape == (SIDE, SIDE, 3)
    assert tuple(pixels[0, 0]) == COLOURS["white"]
    assert tuple(pixels[48, 32]) == COLOURS["red"]


@pytest.mark.parametrize("shape", OUTLINES)
def test_a_shape_covers_as_many_pixels_as_its_outline_encloses(shape: str) -> None:
    outline = OUTLINES[shape] * 20 + 32
    x, y = outline.T
    enclosed = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    assert covered(outline).sum() == pytest.approx(enclosed, rel=0.03)  # Pillow takes an edge along


def test_no_shape_touches_the_edge_wherever_chance_puts_it() -> None:
    rng = np.random.default_rng(3)
    for scene in SCENES[::5]:
        pixels = draw(scene, rng)
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (border == pixels[0, 0]).all(), scene


def test_a_caption_names_what_it_is_told_to_name() -> None:
    assert worded(SCENE, 0) == "an orange star on blue"
    assert worded(SCENE, 1, names_size=True) == "a small orange star on a blue background"
    assert worded(SCENE, 4, names_place=True) == "orange star, blue background on the left"


def test_captions_vary_in_wording_and_in_what_they_leave_open() -> None:
    rng = np.random.default_rng(0)
    captions = [caption(SCENE, rng) for _ in range(300)]
    assert all(re.search(r"orange star\b", text) for text in captions)
    assert all(re.search(r"\bblue\b", text) for text in captions)
    for word in ("small", "left"):
        assert 0.3 < sum(word in text for text in captions) / len(captions) < 0.7
    assert len(set(captions)) > 150


def test_words_around_a_text_leave_it_whole_and_name_no_scene() -> None:
    rng = np.random.default_rng(0)
    texts = [dressed("a red circle on blue", rng, BEGINNINGS, PRAISE) for _ in range(100)]
    assert all("a red circle on blue" in text and len(text) > 21 for text in texts)
    known = {*COLOURS, *OUTLINES}
    around = {word for phrase in (*BEGINNINGS, *PRAISE, *BLAME) for word in phrase.split()}
    assert not known & around
    assert not known & set(" ".join(nothing(rng) for _ in range(100)).split())
