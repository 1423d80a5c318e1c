"""What a payload asks of a picture, judged by looking at it: guidance, img2img, inpainting."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gpu_worker.demo_model.captions import worded
from gpu_worker.demo_model.judge import is_right, see
from gpu_worker.demo_model.scenes import COLOURS, DIRECTIONS, OUTLINES, Pixels, Scene, draw, random_scene
from gpu_worker.engine import decoding
from gpu_worker.models import weights
from gpu_worker.pictures.hints import prepared
from gpu_worker.tasks import img2img, stages, txt2img
from tests.gpu_worker.driving import crew, drive, img2img_of, txt2img_of
from tests.gpu_worker.engine.test_decoding import memory_for
from tests.pictures import encoded, mask

SMALL: dict[str, Any] = {"width": 64, "height": 64, "steps": 20, "sampler_name": "Euler a", "cfg_scale": 4}


def drawn(models: weights.Models, payloads: list[dict[str, Any]]) -> list[Pixels]:
    """A picture of each txt2img payload."""
    requests = [txt2img_of(**SMALL | payload) for payload in payloads]
    tasks = [
        (0, txt2img.generate(request, prepared(request), crew(models), None, lambda _: None)) for request in requests
    ]
    return [images[0] for images in drive(tasks)]


def redrawn(models: weights.Models, payloads: list[dict[str, Any]]) -> list[Pixels]:
    """A picture of each img2img payload."""
    requests = [img2img_of(**SMALL | payload) for payload in payloads]
    canvases = [prepared(request) for request in requests]
    tasks = [
        (0, img2img.generate(request, canvas, crew(models), lambda _: None))
        for request, canvas in zip(requests, canvases, strict=True)
    ]
    found = drive(tasks)
    return [canvas.finished(images[0], 0) for canvas, images in zip(canvases, found, strict=True)]


def num_right(pictures: list[Pixels], scenes: list[Scene]) -> int:
    return sum(is_right(pixels, scene) for pixels, scene in zip(pictures, scenes, strict=True))


def position(pixels: Pixels) -> str | None:
    sight = see(pixels)
    return None if sight is None else sight.scene.position


@pytest.mark.slow
def test_more_guidance_follows_the_prompt_more(models: weights.Models) -> None:
    rng = np.random.default_rng(1)
    scenes = [random_scene(rng) for _ in range(24)]

    def at(cfg_scale: float) -> int:
        payloads = [
            {"prompt": worded(scene, 0), "seed": seed, "cfg_scale": cfg_scale} for seed, scene in enumerate(scenes)
        ]
        return num_right(drawn(models, payloads), scenes)

    followed = at(5.0)
    assert at(1.0) < followed
    assert followed >= 22


@pytest.mark.slow
def test_a_negative_prompt_is_kept_away_from(models: weights.Models) -> None:
    """The prompt leaves the place open, and the negative one names one."""
    payload = {"prompt": "a red circle on blue", "cfg_scale": 5}

    def places(negative: str) -> list[str | None]:
        return [
            position(pixels)
            for pixels in drawn(models, [payload | {"negative_prompt": negative, "seed": seed} for seed in range(24)])
        ]

    assert places("a red circle on the left on a blue background").count("left") < places("").count("left")


def test_img2img_keeps_the_layout_and_changes_what_the_prompt_says(models: weights.Models) -> None:
    scenes = [Scene("square", "green", "white", "medium", place) for place in DIRECTIONS] * 2
    wanted = [replace(scene, colour="red") for scene in scenes]
    pictures = redrawn(
        models,
        [
            {
                "prompt": "a red square on white",
                "init_images": [encoded(Image.fromarray(draw(scene)))],
                "denoising_strength": 0.3,
                "seed": seed,
            }
            for seed, scene in enumerate(scenes)
        ],
    )
    assert num_right(pictures, wanted) >= 9
    assert sum(position(p) == scene.position for p, scene in zip(pictures, scenes, strict=True)) >= 9


@pytest.mark.parametrize(
    "fill",
    [
        pytest.param(0, id="filled", marks=pytest.mark.slow),
        pytest.param(1, id="original", marks=pytest.mark.slow),
        pytest.param(2, id="noise"),
        pytest.param(3, id="nothing", marks=pytest.mark.slow),
    ],
)
def test_inpainting_paints_the_named_thing_into_the_hole_and_keeps_the_rest(models: weights.Models, fill: int) -> None:
    originals = [draw(Scene(shape, "green", "white")) for shape in OUTLINES]
    wanted = [Scene(shape, colour, "white") for shape, colour in (("star", "red"), ("circle", "blue"))] * 2
    hole = (10, 10, 54, 54)
    found = redrawn(
        models,
        [
            {
                "prompt": worded(scene, 0),
                "init_images": [encoded(Image.fromarray(original))],
                "mask": encoded(mask(hole)),
                "mask_blur": 0,
                "inpainting_fill": fill,
                "inpaint_full_res": False,
                "denoising_strength": 1.0,
                "seed": seed,
            }
            for seed, (scene, original) in enumerate(zip(wanted, originals, strict=True))
        ],
    )
    outside = np.asarray(mask(hole)) == 0
    for pixels, original in zip(found, originals, strict=True):
        assert (pixels[outside] == original[outside]).all()
    assert num_right(found, wanted) >= 3


def test_inpainting_only_the_masked_part_paints_it_small(models: weights.Models) -> None:
    """A picture of four times the size with a hole in a corner: the scene is drawn at its size, and scaled into it."""
    wide = Image.new("RGB", (256, 256), COLOURS["yellow"])
    wide.paste(Image.new("RGB", (20, 20), COLOURS["black"]), (180, 30))
    hole = (160, 16, 224, 80)
    (found,) = redrawn(
        models,
        [
            {
                "prompt": "a purple circle on yellow",
                "init_images": [encoded(wide)],
                "mask": encoded(mask(hole, 256, 256)),
                "mask_blur": 0,
                "inpaint_full_res": True,
                "inpaint_full_res_padding": 0,
                "inpainting_fill": 2,
                "denoising_strength": 1.0,
                "seed": 2,
            }
        ],
    )
    assert is_right(np.asarray(Image.fromarray(found).crop(hole)), Scene("circle", "purple", "yellow"))


@torch.inference_mode()
def test_a_picture_decoded_in_tiles_is_as_close_to_the_original(models: weights.Models) -> None:
    """Sixteen scenes in one picture, in tiles of four."""
    rng = np.random.default_rng(0)
    rows = [np.concatenate([draw(random_scene(rng)) for _ in range(4)], 1) for _ in range(4)]
    original = np.concatenate(rows)
    latents = stages.latents_of(models, stages.as_tensor(original)) / models.vae.config.scaling_factor
    whole = decoding.decode(models.vae, latents)
    with memory_for(models.vae.decoder, 20) as sides:
        tiled = decoding.decode(models.vae, latents)
    assert max(sides[2:]) == 16
    errors = [float((found - stages.as_tensor(original)).abs().mean()) for found in (whole, tiled)]
    assert errors[1] < 1.1 * errors[0]
