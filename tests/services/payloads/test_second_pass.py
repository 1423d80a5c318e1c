"""The second pass of txt2img: its size, steps and names, and what is refused."""

from typing import Any

import pytest

from services.common.errors import InvalidArgument
from services.common.payloads import Txt2Img, check, used


def txt2img(**fields: Any) -> Txt2Img:
    request = check("txt2img", {"enable_hr": True} | fields, "job")
    assert isinstance(request, Txt2Img)
    assert check("txt2img", request.model_dump(), "job") == request
    return request


@pytest.mark.parametrize(
    ("fields", "full", "size"),
    [
        ({}, (1024, 1024), (1024, 1024)),
        ({"width": 64, "height": 96, "hr_scale": 1.5}, (96, 144), (96, 144)),
        ({"width": 72, "height": 64, "hr_scale": 1.3}, (88, 80), (88, 80)),
        ({"hr_resize_x": 768}, (768, 768), (768, 768)),
        ({"width": 512, "height": 256, "hr_resize_y": 512}, (1024, 512), (1024, 512)),
        ({"hr_resize_x": 1024, "hr_resize_y": 768}, (1024, 1024), (1024, 768)),
        ({"hr_resize_x": 640, "hr_resize_y": 1024}, (1024, 1024), (640, 1024)),
    ],
)
def test_its_size_keeps_the_proportions_and_is_cut_to_what_was_asked(
    fields: dict[str, Any], full: tuple[int, int], size: tuple[int, int]
) -> None:
    request = txt2img(**fields)
    assert (request.hr_full_size, request.hr_size) == (full, size)


def test_all_its_steps_are_made_on_a_longer_schedule() -> None:
    request = txt2img(steps=20, hr_second_pass_steps=10, denoising_strength=0.4)
    second = request.second_pass
    assert second is not None
    assert (second.steps, second.num_steps, second.first_step) == (25, 10, 15)
    assert request.total_steps == 30
    none = txt2img(steps=20, denoising_strength=0)
    assert none.second_pass is not None
    assert (none.second_pass.num_steps, none.total_steps) == (0, 20)
    full = txt2img(steps=20, denoising_strength=1).second_pass
    assert full is not None
    assert (full.steps, full.num_steps) == (20, 20)
    assert txt2img(enable_hr=False, hr_upscaler="R-ESRGAN 4x+", hr_scale=99).second_pass is None


def test_it_has_names_of_its_own_or_those_of_the_first() -> None:
    request = txt2img(
        prompt="a <lora:one:1>",
        hr_prompt="b <lora:two:1>",
        negative_prompt="n",
        sampler_name="Euler a",
        hr_sampler_name="DPM++ 2M",
        hr_scheduler="Karras",
    )
    second = request.second_pass
    assert second is not None
    assert (second.prompt, second.negative_prompt, second.sampler_name) == ("b <lora:two:1>", "n", "DPM++ 2M Karras")
    models = [("Lora", "two.pt"), ("Stable-diffusion", "x"), ("Lora", "one.pt")]
    assert used(request, models) == [1, 2, 0]
    plain = txt2img(prompt="a", hr_sampler_name="Use same sampler", hr_checkpoint_name="Use same checkpoint")
    assert plain.second_pass is not None
    assert (plain.second_pass.prompt, plain.second_pass.sampler_name) == ("a", "Euler")
    assert plain.ignored == []


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"sampler_name": "DPM++ 2M", "scheduler": "Karras", "hr_sampler_name": "DPM2"}, "DPM2 Karras"),
        (
            {"sampler_name": "DPM++ 2M Karras", "hr_sampler_name": "Euler", "hr_scheduler": "Use same scheduler"},
            "Euler Karras",
        ),
        ({"scheduler": "Automatic", "hr_sampler_name": "DPM++ 2M SDE"}, "DPM++ 2M SDE Exponential"),
        ({"scheduler": "Karras", "hr_sampler_name": "Euler", "hr_scheduler": "Uniform"}, "Euler"),
        ({"scheduler": "Karras", "hr_sampler_name": "Euler Beta"}, "Euler Beta"),
        ({"scheduler": "Karras", "hr_sampler_name": "DDIM"}, "DDIM"),
        ({"sampler_name": "DPM++ 2M Karras", "hr_scheduler": "Beta"}, "DPM++ 2M Beta"),
        (
            {"sampler_name": "DPM2 a", "hr_sampler_name": "Use same sampler", "hr_scheduler": "Automatic"},
            "DPM2 a Karras",
        ),
        ({"sampler_name": "DPM++ 2M Karras"}, "DPM++ 2M Karras"),
    ],
)
def test_its_sampler_and_schedule_are_each_the_first_ones_where_it_has_none(fields: dict[str, Any], name: str) -> None:
    request = txt2img(**fields)
    assert request.second_pass is not None
    assert (request.second_pass.sampler_name, request.ignored) == (name, [])


def test_a_schedule_that_its_sampler_does_not_have_is_named_as_ignored() -> None:
    assert txt2img(hr_sampler_name="DDIM", hr_scheduler="Karras").ignored == ["hr_scheduler"]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"hr_sampler_name": "Magic"}, 'hr_sampler_name "Magic" is not known; possible: Euler, '),
        ({"hr_scale": 9}, "hr_scale 9 is out of range: 1.0 to 8.0 is possible"),
        ({"width": 1024, "hr_scale": 5}, "the second pass has 5120x2560 pixels; each way at most 4096 are possible"),
        (
            {"denoising_strength": 0.01},
            "denoising_strength 0.01 is too little for 50 steps: from 0.05 on",
        ),
    ],
)
def test_what_cannot_be_made_is_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        txt2img(**fields)
    assert sentence.replace("1.0 to 8.0", "1 to 8") in str(refused.value).replace("1.0 to 8.0", "1 to 8")


def test_an_upscaler_that_is_not_built_in_is_a_model_of_the_job() -> None:
    models = [("Stable-diffusion", "x"), ("ESRGAN", "4x-UltraSharp.pth")]
    assert used(txt2img(hr_upscaler="4x-UltraSharp"), models) == [0, 1]
    assert used(txt2img(hr_upscaler="Lanczos"), models) == [0]
    assert used(txt2img(hr_upscaler="4x-UltraSharp", enable_hr=False), models) == [0]
    with pytest.raises(InvalidArgument) as refused:
        used(txt2img(hr_upscaler="R-ESRGAN 4x+"), models)
    assert str(refused.value) == (
        "hr_upscaler names R-ESRGAN 4x+ (RealESRGAN_x4plus), which is not among the job's models of type ESRGAN; "
        "there: 4x-UltraSharp.pth; built in: Latent, Latent (antialiased), Latent (bicubic), "
        "Latent (bicubic antialiased), Latent (nearest), Latent (nearest-exact), None, Lanczos, Nearest"
    )
