"""The x/y/z plot: its arguments, its values, the requests it stands for, and what is refused."""

import json
from typing import Any

import pytest

from services.common.errors import InvalidArgument
from services.common.payloads import Generation, check, used
from tests.pictures import encoded, noise

SMALL = {"prompt": "a red circle on blue", "width": 64, "height": 64, "seed": 10, "steps": 5}


def plot_args(*axes: Any, **switches: Any) -> list[Any]:
    """The script's arguments as A1111 1.8 has them: type, values and chosen values of each axis, and the switches."""
    given = [part for axis in axes for part in (*axis, "", [])[:3]] + [0, "", []] * (3 - len(axes))
    names = ("draw_legend", "lone", "sub", "no_fixed_seeds", "vary_x", "vary_y", "vary_z", "margin", "csv")
    defaults = {"draw_legend": True, "margin": 0}
    return given + [switches.get(name, defaults.get(name, False)) for name in names]


def plotted(*axes: Any, task: str = "txt2img", fields: Any = None, **switches: Any) -> Generation:
    given = SMALL | {"script_name": "X/Y/Z plot", "script_args": plot_args(*axes, **switches)} | (fields or {})
    request = check(task, given, "job")
    assert isinstance(request, Generation)
    assert check(task, json.loads(json.dumps(request.model_dump())), "job") == request
    return request


def test_one_request_becomes_many_x_by_x_then_y_by_y_then_z_by_z() -> None:
    request = plotted((4, "2,3"), (6, "1, 7.5"), (1, "20-22"))
    found = [(cell.steps, cell.cfg_scale, cell.seed) for cell in request.cells()]
    assert found == [(s, c, seed) for seed in (20, 21, 22) for c in (1.0, 7.5) for s in (2, 3)]
    assert (request.num_painted, request.num_images) == (12, 1)
    assert all(cell.plot is None for cell in request.cells())
    assert request.ignored == []
    plain = check("txt2img", SMALL, "job")
    assert isinstance(plain, Generation)
    assert plain.cells() == [plain]


@pytest.mark.parametrize(
    ("axis", "field", "values"),
    [
        ((1, "1-5"), "seed", [1, 2, 3, 4, 5]),
        ((1, "1-10 (+4)"), "seed", [1, 5, 9]),
        ((4, "10-5 (-2)"), "steps", [10, 8, 6]),
        ((4, "1-10 [4]"), "steps", [1, 4, 7, 10]),
        ((6, "1-2 (+0.5)"), "cfg_scale", [1.0, 1.5, 2.0]),
        ((6, "2-8 [3]"), "cfg_scale", [2.0, 5.0, 8.0]),
        (("CFG Scale", " 3 ,4"), "cfg_scale", [3.0, 4.0]),
        ((2, "5,6"), "subseed", [5, 6]),
        ((3, "0.1"), "subseed_strength", [0.1]),
        (("Clip skip", "1-3"), "clip_skip", [1, 2, 3]),
        ((22, "1-3"), "clip_skip", [1, 2, 3]),
        ((27, "", ["Automatic", "soft"]), "vae_name", ["Automatic", "soft"]),
        ((35, "", ["None", "fine"]), "refiner_checkpoint", ["", "fine"]),
        ((36, "0.5,0.6"), "refiner_switch_at", [0.5, 0.6]),
        ((9, "", ["Euler a", "DPM++ 2M Karras"]), "sampler_name", ["Euler a", "DPM++ 2M Karras"]),
        ((9, "euler, ddim"), "sampler_name", ["Euler", "DDIM"]),
        ((1, "-1, -1"), "seed", [11, 12]),
        ((4, "2, 3,"), "steps", [2, 3]),
        ((4, "2,\n3"), "steps", [2, 3]),
        ((4, "2,3", ["Euler a", "DDIM"]), "steps", [2, 3]),
    ],
)
def test_values_are_lists_ranges_and_counts(axis: Any, field: str, values: list[Any]) -> None:
    assert [getattr(cell, field) for cell in plotted(axis).cells()] == values


def test_search_and_replace_puts_other_words_in_both_prompts() -> None:
    request = plotted((7, 'red, green, "blue, light"'), fields={"negative_prompt": "dark red"})
    assert [(cell.prompt, cell.negative_prompt) for cell in request.cells()] == [
        ("a red circle on blue", "dark red"),
        ("a green circle on blue", "dark green"),
        ("a blue, light circle on blue", "dark blue, light"),
    ]
    assert request.plot is not None
    assert request.plot.x.labels == ["red", "green", "blue, light"]


def test_numbers_of_img2img_are_its_own() -> None:
    axes = (5, "3,4"), (9, "Euler"), (26, "", ["Automatic"])
    request = plotted(*axes, task="img2img", fields={"init_images": [encoded(noise())]})
    assert request.plot is not None
    assert [axis.name for axis in (request.plot.x, request.plot.y, request.plot.z)] == ["CFG Scale", "Sampler", "VAE"]
    assert request.plot.x.labels == ["CFG Scale: 3.0", "CFG Scale: 4.0"]


def test_seeds_may_differ_by_place() -> None:
    request = plotted((4, "2,3"), (6, "1,2,3"), vary_x=True, vary_y=True)
    assert [cell.seed for cell in request.cells()] == [10, 11, 12, 13, 14, 15]
    free = plotted((4, "2,3"), fields={"seed": -1}, no_fixed_seeds=True)
    assert len({cell.seed for cell in free.cells()}) == 2
    assert len({cell.seed for cell in plotted((4, "2,3"), no_fixed_seeds=True).cells()}) == 1


def test_the_arguments_of_older_versions_have_three_less() -> None:
    arguments = [4, "2,3", [], 0, "", [], 0, "", []]
    for switches in ([True, True, True, False, 7, False], ["True", "True", "True", "False", 7]):
        request = plotted(fields={"script_args": arguments + switches})
        assert request.plot is not None
        assert (request.plot.margin_size, request.num_images) == (7, 1 + 1 + 2)


def test_the_models_of_all_cells_are_used() -> None:
    models = [("Stable-diffusion", name) for name in ("a.safetensors", "b.ckpt", "c.pt")]
    request = plotted((11, "", ["c", "a.safetensors"]))
    assert used(request, models) == [2, 0]
    with pytest.raises(InvalidArgument, match="names gone, which is not among the job's models"):
        used(plotted((11, "gone")), models)
    models.append(("VAE", "soft.vae.pt"))
    assert used(plotted((27, "None, soft.vae"), (35, "None, b")), models) == [0, 3, 1]


@pytest.mark.parametrize(
    ("axes", "sentence"),
    [
        ([(8, "a,b")], "x/y/z plot: X type 8 cannot be varied here; possible: Nothing, Seed, "),
        ([(0,), ("Face restore", "a")], 'x/y/z plot: Y type "Face restore" cannot be varied here'),
        ([(99, "1")], "x/y/z plot: X type 99 cannot be varied here"),
        ([(True, "1")], "x/y/z plot: X type true cannot be varied here"),
        ([(4, "few")], 'x/y/z plot: X values "few" cannot be read as those of Steps'),
        ([(4, "1\r2")], 'x/y/z plot: X values "1\\r2" cannot be read as those of Steps'),
        ([(4, "1" * 200_000)], 'x/y/z plot: X values "1111'),
        ([(4, f"1-{'9' * 400}")], 'x/y/z plot: X values "1-99'),
        ([(4, f"1-2 [{'9' * 5000}]")], 'x/y/z plot: X values "1-2 [99'),
        ([(7, f"red, {'x' * 1001}")], "plot.x: a value has 1001 letters; at most 1000 are possible"),
        ([(4, "")], "X has 0 values of Steps; 1 to 64 are possible"),
        ([(1, "1-1000")], "X has 65 values of Seed; 1 to 64 are possible"),
        ([(1, "1-9"), (4, "1-9")], "x/y/z plot: 81 pictures and their grids; at most 64 are possible"),
        ([(7, "green, blue")], 'Prompt S/R did not find "green" in prompt or negative_prompt'),
        (
            [(4, "5, 900"), (6, "7")],
            "x/y/z plot, Steps: 900, CFG Scale: 7.0: steps 900 is out of range: 1 to 150 is po",
        ),
        ([(9, "Euler, Magic")], 'x/y/z plot, Magic: sampler_name "Magic" is not known; possible: Euler, '),
    ],
)
def test_what_cannot_be_had_is_refused(axes: list[Any], sentence: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        plotted(*axes)
    assert sentence in str(refused.value)


def test_a_plot_paints_on_one_picture() -> None:
    pictures = [encoded(noise()), encoded(noise(seed=2))]
    with pytest.raises(InvalidArgument, match="x/y/z plot: it paints on one picture, and init_images has 2"):
        plotted((4, "2,3"), task="img2img", fields={"init_images": pictures})


def test_a_grid_of_too_many_pixels_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="the grid has 83886080 pixels; at most 67108864 are possible"):
        plotted((1, "1-20"), fields={"width": 2048, "height": 2048})


@pytest.mark.parametrize(
    ("x", "sentence"),
    [
        ({"name": "Magic", "values": [1]}, 'plot.x: name "Magic" cannot be varied here; possible: Nothing, Seed'),
        ({"name": "Steps", "values": ["many"]}, "plot.x: values "),
        ({"name": "Steps", "values": []}, "plot.x.values []: list should have at least 1 item"),
    ],
)
def test_a_plot_of_the_checked_form_is_checked_as_strictly(x: dict[str, Any], sentence: str) -> None:
    fields = plotted(("Steps", "1,2")).model_dump()
    with pytest.raises(InvalidArgument) as refused:
        check("txt2img", fields | {"plot": fields["plot"] | {"x": x}}, "job")
    assert sentence in str(refused.value)


def test_an_unknown_script_is_named_and_changes_nothing() -> None:
    request = check("txt2img", SMALL | {"script_name": "Outpainting mk2", "script_args": [1, 2]}, "job")
    assert request.ignored == ["script Outpainting mk2"]
    assert check("txt2img", SMALL | {"script_name": None, "script_args": [1]}, "job").ignored == []
