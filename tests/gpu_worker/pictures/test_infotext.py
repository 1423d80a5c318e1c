"""The text in a picture, as A1111 reads it back when the picture is dropped on it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from gpu_worker.files.cache import CachedModel
from gpu_worker.pictures.infotext import Made, infotext
from services.common.payloads import Generation, check

# A name, and a value in quotes or up to the next comma.
FIELD = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
FILES = [CachedModel("1", "Stable-diffusion", "sd: v1, pruned.safetensors", Path(), "a" * 64)]


def fields_of(**payload: Any) -> dict[str, str]:
    request = check("txt2img", {"prompt": "a cat", "seed": 7, "steps": 20} | payload, "job")
    assert isinstance(request, Generation)
    last = infotext(Made(request, 0, FILES)).splitlines()[-1]
    found = FIELD.findall(last[: last.index(", Hashes: ")])
    return {name: json.loads(value) if value.startswith('"') else value for name, value in found}


def test_the_fields_come_in_a1111s_order() -> None:
    settings = {"CLIP_stop_at_last_layers": 2, "eta_noise_seed_delta": 31337}
    found = fields_of(
        enable_hr=True, s_min_uncond=1, s_noise=1.1, tiling=True, subseed_strength=0.5, override_settings=settings
    )
    assert list(found) == [
        *("Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size", "Model hash", "Model"),
        *("Variation seed", "Variation seed strength", "Denoising strength", "Clip skip", "ENSD", "RNG", "NGMS"),
        *("Sigma noise", "Tiling", "Hires upscale", "Hires upscaler"),
    ]


def test_a_value_that_looks_like_several_fields_is_read_as_one() -> None:
    prompt = "été, (a dog:1.2)\nBREAK"
    found = fields_of(enable_hr=True, hr_prompt=prompt, hr_negative_prompt="dull")
    assert (found["Hires prompt"], found["Hires negative prompt"]) == (prompt, "dull")
    assert found["Model"] == "sd: v1, pruned"


def test_the_noise_is_said_to_be_whose_it_is_where_it_is_no_gpus() -> None:
    assert fields_of()["RNG"] == "CPU"
    assert fields_of(override_settings={"randn_source": "NV"})["RNG"] == "NV"
    assert "RNG" not in fields_of(override_settings={"randn_source": "GPU"})


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        ({"sampler_name": "DPM++ 2M"}, {"Sampler": "DPM++ 2M", "Schedule type": "Uniform"}),
        ({"sampler_name": "DPM++ 2M Karras"}, {"Sampler": "DPM++ 2M Karras", "Schedule type": "Karras"}),
        ({"sampler_name": "DDIM"}, {"Sampler": "DDIM"}),
        (
            {"enable_hr": True, "scheduler": "Karras", "hr_sampler_name": "DPM++ SDE", "hr_scheduler": "Uniform"},
            {
                "Sampler": "Euler Karras",
                "Schedule type": "Karras",
                "Hires sampler": "DPM++ SDE",
                "Hires schedule type": "Uniform",
            },
        ),
    ],
)
def test_a_sampler_is_read_with_its_schedule_whatever_a_bare_name_means(
    payload: dict[str, Any], said: dict[str, str]
) -> None:
    found = fields_of(**payload)
    assert {name: value for name, value in found.items() if "ampler" in name or "chedule" in name} == said
