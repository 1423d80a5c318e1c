"""The exam: what it asks, and how it counts."""

from dataclasses import replace

from gpu_worker.demo_model.exam import Question, marks, questions
from gpu_worker.demo_model.scenes import COLOURS, OUTLINES, Scene, draw

PLAIN = questions()


def test_marks_count_each_thing_where_it_is_asked_for() -> None:
    scene = Scene("circle", "red", "blue", "small", "left")
    asked = [Question("", scene), Question("", scene, names_size=True), Question("", scene, names_place=True)]
    others = [replace(scene, shape="star"), replace(scene, size="large"), replace(scene, position="top")]
    found = marks(asked, [draw(other) for other in others])
    assert (found.right, found.shape, found.colour, found.ground) == (2, 2, 3, 3)
    assert (found.size, found.num_sizes, found.place, found.num_places) == (0, 1, 0, 1)
    perfect = marks(asked, [draw(scene)] * 3)
    assert (perfect.right, perfect.size, perfect.place) == (3, 1, 1)


def test_the_questions_are_all_different_and_ask_for_every_shape_and_colour() -> None:
    assert len({question.prompt for question in PLAIN}) > 90
    scenes = [question.scene for question in PLAIN]
    assert {scene.shape for scene in scenes} == set(OUTLINES)
    assert {scene.colour for scene in scenes} == {scene.ground for scene in scenes} == set(COLOURS)
    assert questions() == PLAIN
