"""Payloads: what is absent, what is wrong, what is ignored and what is refused."""

import json
import re
import sys

import pytest

from services.common.errors import InvalidArgument
from services.common.payloads import Generation, samplers
from services.common.payloads.reading import seed_of
from services.inference.submitting.payload import check_json, check_payload
from tests.pictures import encoded, noise

JOB = "7f3c0b0e-4f4e-4c6e-9d0a-0f6a1e6a2b11"


def check(**fields: object) -> dict[str, object]:
    return check_payload(json.dumps(fields), "txt2img", JOB).fields


def test_what_is_absent_or_null_has_the_default_of_a1111() -> None:
    fields = check(prompt="a cat", steps=None, unknown_field=[1], alwayson_scripts={"mystery": {"args": [1]}})
    assert fields == {
        "prompt": "a cat",
        "negative_prompt": "",
        "seed": seed_of(JOB),
        "subseed": seed_of(f"{JOB} subseed"),
        "subseed_strength": 0.0,
        "seed_resize_from_w": 0,
        "seed_resize_from_h": 0,
        "sampler_name": "Euler",
        "steps": 50,
        "cfg_scale": 7.0,
        "width": 512,
        "height": 512,
        "batch_size": 1,
        "n_iter": 1,
        "tiling": False,
        "eta": None,
        "eta_ancestral": 1.0,
        "eta_ddim": 0.0,
        "s_min_uncond": 0.0,
        "s_noise": 1.0,
        "noise_source": "CPU",
        "noise_seed_delta": 0,
        "clip_skip": 1,
        "exclusive": False,
        "form": "checked",
        "enable_hr": False,
        "denoising_strength": 0.75,
        "hr_scale": 2.0,
        "hr_resize_x": 0,
        "hr_resize_y": 0,
        "hr_upscaler": "Latent",
        "hr_second_pass_steps": 0,
        "hr_sampler_name": "",
        "hr_checkpoint_name": "",
        "hr_prompt": "",
        "hr_negative_prompt": "",
        "model_name": "",
        "refiner_checkpoint": "",
        "refiner_switch_at": 0.8,
        "refiner_pass": "second pass",
        "controlnet": [],
        "plot": None,
        "vae_name": "",
        "disable_extra_networks": False,
        "ignored": ["unknown_field", "script mystery"],
    }


def test_clip_skip_comes_from_the_overridden_setting() -> None:
    assert check(override_settings={"CLIP_stop_at_last_layers": 2, "sd_vae": None})["clip_skip"] == 2
    assert check(override_settings={"eta_noise_seed_delta": 31337})["noise_seed_delta"] == 31337
    assert check(override_settings=None)["clip_skip"] == 1


def test_a_setting_counts_where_the_payload_says_nothing() -> None:
    settings = {"s_min_uncond": 1.5, "tiling": True}
    assert check(override_settings=settings) == check(s_min_uncond=1.5, tiling=True)
    own = {"s_min_uncond": 0, "tiling": False}
    assert check(override_settings=settings, **own) == check()
    picture = encoded(noise())
    given = {"init_images": [picture], "override_settings": {"initial_noise_multiplier": 0.5}}
    assert check_payload(json.dumps(given), "img2img", JOB).fields["initial_noise_multiplier"] == 0.5
    given |= {"override_settings": {"img2img_fix_steps": True}}
    assert check_payload(json.dumps(given), "img2img", JOB).fields["fix_steps"] is True
    given |= {"denoising_strength": 0.01}
    with pytest.raises(InvalidArgument, match=r"denoising_strength 0.01 is too little for 50 steps: from 0.05 on"):
        check_payload(json.dumps(given), "img2img", JOB)


def test_the_noise_may_be_that_of_a_gpu_where_it_is_not_drawn_all_the_time() -> None:
    settings = {"override_settings": {"randn_source": "NV"}}
    assert check(**settings, sampler_name="Euler a")["noise_source"] == "NV"
    for names in ({"sampler_name": "DPM++ 2M SDE Karras"}, {"enable_hr": True, "hr_sampler_name": "DPM++ SDE"}):
        *_, name = names.values()
        sentence = f"override_settings.randn_source NV does not go with {name}, for which it would be drawn too slowly"
        with pytest.raises(InvalidArgument, match=re.escape(sentence)):
            check(**settings, **names)
        assert check(**names)["noise_source"] == "CPU"
    with pytest.raises(InvalidArgument, match=r'noise_source "TPU": input should be \'CPU\', \'GPU\' or \'NV\''):
        check(override_settings={"randn_source": "TPU"})


def test_a_seed_of_minus_one_depends_on_the_job_only() -> None:
    assert check(seed=-1) == check(seed=-1)
    assert 0 <= seed_of(JOB) < 2**32
    assert seed_of(JOB) != seed_of(JOB.replace("7", "8"))
    assert check(seed=156680208700286)["seed"] == 156680208700286


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"steps": 0}, "steps 0 is out of range: 1 to 150 is possible"),
        ({"steps": 100000}, "steps 100000 is out of range: 1 to 150 is possible"),
        ({"width": 4100}, "width 4100 is out of range: 64 to 4096 is possible"),
        ({"height": 8}, "height 8 is out of range: 64 to 4096 is possible"),
        ({"height": 8192}, "height 8192 is out of range: 64 to 4096 is possible"),
        ({"cfg_scale": 1000}, "cfg_scale 1000 is out of range: 0 to 30 is possible"),
        ({"batch_size": 0}, "batch_size 0 is out of range: 1 to 8 is possible"),
        ({"batch_size": 8, "n_iter": 9}, "batch_size 8 times n_iter 9 is 72 images; at most 64 are possible"),
        ({"sampler_name": "Magic"}, 'sampler_name "Magic" is not known; possible: Euler, Euler a, LMS, Heun, DPM2, '),
        ({"sampler_name": ["Euler"]}, 'sampler_name ["Euler"] is not known; possible: Euler, Euler a, LMS, Heun, '),
        ({"sampler_name": "DPM adaptive"}, 'sampler_name "DPM adaptive" cannot be run here; possible: Euler, '),
        ({"scheduler": "KL Optimal"}, 'scheduler "KL Optimal" does not go with sampler_name "Euler"'),
        (
            {"override_settings": {"CLIP_stop_at_last_layers": 13}},
            "clip_skip 13 is out of range: 1 to 12 is possible",
        ),
        ({"exclusive": "perhaps"}, 'exclusive "perhaps": input should be a valid boolean'),
        ({"scheduler": [1]}, 'scheduler [1] does not go with sampler_name "Euler"'),
        ({"steps": "many"}, 'steps "many": input should be a valid integer'),
        ({"prompt": "a\0b"}, "prompt contains a character that is no text"),
        ({"prompt": "\ud800"}, "prompt contains a character that is no text"),
        ({"enable_hr": True, "hr_prompt": "\ud800"}, "hr_prompt contains a character that is no text"),
        ({"enable_hr": True, "hr_prompt": "<lora:a:x>"}, '<lora:a:x>: "x" is no number'),
        ({"enable_hr": True, "hr_prompt": " AND " * 9}, "hr_prompt joins 10 texts with AND; at most 8 are possible"),
        (
            {"alwayson_scripts": {"controlnet": {"args": [{"model": "a\0", "image": encoded(noise())}]}}},
            "controlnet[0].model contains a character that is no text",
        ),
        (
            {"prompt": "a cat", "script_name": "x/y/z plot", "script_args": [7, "cat,\0", []]},
            "plot.x.values[1] contains a character that is no text",
        ),
    ],
)
def test_what_cannot_be_run_is_refused_with_field_and_value(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        check(**fields)
    assert sentence in str(refused.value)


def test_numbers_are_cut_to_whole_ones_and_sides_to_whole_latents() -> None:
    fields = check(width=554.67, height="683", steps=20.9, seed=1234.5, cfg_scale="7")
    found = [fields[name] for name in ("width", "height", "steps", "seed", "cfg_scale")]
    assert found == [552, 680, 20, 1234, 7.0]


def test_all_wrong_fields_are_named_at_once() -> None:
    with pytest.raises(InvalidArgument) as refused:
        check(steps=0, width=7)
    assert "steps 0" in str(refused.value)
    assert "width 7" in str(refused.value)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"sampler_name": "DPM++ 2M Karras"}, "DPM++ 2M Karras"),
        ({"sampler_name": "DPM++ 2M", "scheduler": "Karras"}, "DPM++ 2M Karras"),
        ({"sampler_name": "DPM++ 2M", "scheduler": "Automatic"}, "DPM++ 2M Karras"),
        ({"sampler_name": "DPM++ 2M"}, "DPM++ 2M"),
        ({"sampler_name": "DPM++ 2M", "scheduler": "Uniform"}, "DPM++ 2M"),
        ({"scheduler": "sgm_uniform"}, "Euler SGM Uniform"),
        ({"scheduler": "SGMUniform"}, "Euler SGM Uniform"),
        ({"scheduler": "Simple"}, "Euler Simple"),
        ({"sampler_name": "DPM++ 2M Karras", "scheduler": "Simple"}, "DPM++ 2M Karras"),
        ({"scheduler": "normal"}, "Euler"),
        ({"scheduler": "Polyexponential"}, "Euler Exponential"),
        ({"sampler_name": "dpm++ 2m sde", "scheduler": "automatic"}, "DPM++ 2M SDE Exponential"),
        ({"sampler_name": "DPM++ 2M SDE Heun SGM Uniform"}, "DPM++ 2M SDE Heun SGM Uniform"),
        ({"scheduler": "Beta"}, "Euler Beta"),
        ({"sampler_index": "Euler a"}, "Euler a"),
        ({"sampler_name": "Euler a", "scheduler": "Karras"}, "Euler a Karras"),
        ({"sampler_name": "DDIM", "scheduler": "Align Your Steps"}, "DDIM"),
        ({"sampler_name": "DPM fast Karras"}, "DPM fast"),
        ({"sampler_name": "restart karras"}, "Restart"),
        ({"sampler_name": "Restart", "scheduler": "Automatic"}, "Restart"),
        ({"sampler_name": "Euler a", "sampler_index": "Euler"}, "Euler a"),
        ({"sampler_name": ""}, "Euler"),
    ],
)
def test_a_sampler_has_one_name_however_it_is_spelled(given: dict[str, object], name: str) -> None:
    assert check(**given)["sampler_name"] == name


@pytest.mark.parametrize("name", ["DPM fast", "DDIM", "PLMS", "UniPC", "LCM"])
def test_samplers_with_a_schedule_of_their_own_ignore_another_and_say_so(name: str) -> None:
    assert check(sampler_name=name, scheduler="Karras")["ignored"] == ["scheduler"]
    for same in ("Automatic", "uniform", "", None):
        assert check(sampler_name=name, scheduler=same)["ignored"] == []


def test_restart_has_the_schedule_of_karras_and_ignores_another() -> None:
    assert samplers.parts("Restart") == ("Restart", "Karras")
    assert check(sampler_name="Restart", scheduler="Uniform")["ignored"] == ["scheduler"]
    for same in ("Automatic", "karras", "", None):
        assert check(sampler_name="Restart", scheduler=same)["ignored"] == []


@pytest.mark.parametrize(
    ("given", "eta"),
    [
        ({"sampler_name": "Euler a"}, 1),
        ({"sampler_name": "Euler a", "eta": 0}, 0),
        ({"sampler_name": "Euler a", "override_settings": {"eta_ancestral": 0.3, "eta_ddim": 0.7}}, 0.3),
        ({"sampler_name": "DPM++ 2M SDE", "eta": 0.5}, 0.5),
        ({"sampler_name": "DDIM"}, 0),
        ({"sampler_name": "DDIM", "override_settings": {"eta_ancestral": 0.3, "eta_ddim": 0.7}}, 0.7),
        ({"sampler_name": "DDIM", "eta": 0.2, "override_settings": {"eta_ddim": 0.7}}, 0.2),
    ],
)
def test_eta_is_the_payloads_or_the_settings_or_that_of_the_sampler(given: dict[str, object], eta: float) -> None:
    request = check_payload(json.dumps(given), "txt2img", JOB).request
    assert isinstance(request, Generation)
    assert (request.sampler_eta, request.ignored) == (eta, [])


def test_infinity_is_the_largest_float_and_nan_is_refused() -> None:
    assert check_payload('{"s_tmax": Infinity, "seed": 1}', "txt2img", JOB).fields["seed"] == 1
    with pytest.raises(InvalidArgument, match="NaN"):
        check_payload('{"s_tmax": NaN}', "txt2img", JOB)
    with pytest.raises(InvalidArgument, match=r"cfg_scale 1.797"):
        check_payload('{"cfg_scale": 1e999}', "txt2img", JOB)
    assert json.loads(json.dumps(sys.float_info.max)) == sys.float_info.max


@pytest.mark.parametrize("text", ["", "{", "[1", "\xff", "[" * 100_000])
def test_what_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"payload is (not valid JSON|nested too deeply)"):
        check_payload(text, "txt2img", JOB)
    with pytest.raises(InvalidArgument, match="payload_string must be valid json string"):
        check_json(text)


@pytest.mark.parametrize("text", ['{"x": [' + "0," * 200_000 + "0]}", "[" * 200_001, '{"x": [{' + "{" * 200_000])
def test_json_of_more_values_than_any_payload_needs_is_not_read(text: str) -> None:
    for content in (text, text.encode()):
        with pytest.raises(InvalidArgument, match="the payload has more than 200000 commas"):
            check_payload(content, "txt2img", JOB)
    with pytest.raises(InvalidArgument, match="the payload has more than 200000 commas"):
        check_json(text)


def test_bytes_that_are_no_text_and_json_that_is_no_object_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="not valid JSON"):
        check_payload(b"\xff\xfe\xfa{", "txt2img", JOB)
    with pytest.raises(InvalidArgument, match="not a JSON object"):
        check_payload("[1, 2]", "txt2img", JOB)


def test_a_task_that_is_not_known_is_refused_by_name() -> None:
    with pytest.raises(
        InvalidArgument, match="task type deepbooru is not known; possible: txt2img, img2img, extra-single-image, "
    ):
        check_payload("{}", "deepbooru", JOB)


def test_a_job_costs_what_its_size_steps_and_number_of_images_say() -> None:
    one = check_payload('{"steps": 10}', "txt2img", JOB)
    four = check_payload('{"steps": 10, "batch_size": 2, "n_iter": 2}', "txt2img", JOB)
    large = check_payload('{"steps": 10, "width": 1024}', "txt2img", JOB)
    assert (four.num_images, four.cost_seconds) == (4, pytest.approx(4 * one.cost_seconds))
    assert large.cost_seconds == pytest.approx(2 * one.cost_seconds)


def test_the_checked_form_is_its_own_checked_form() -> None:
    """The worker reads with the same classes what the service froze."""
    fields = check(prompt="a cat", sampler_name="DPM++ 2M", scheduler="Automatic", unknown=1)
    assert check_payload(json.dumps(fields), "txt2img", "another job").fields == fields


@pytest.mark.parametrize(
    ("scripts", "sentence"),
    [
        ({"reactor": {"args": ["", True]}}, 'the script "reactor" cannot be run here: it needs weights'),
        ({"Tiled Diffusion": {"args": [True]}}, 'the script "Tiled Diffusion" cannot be run here'),
        ({"ADetailer": {"args": [True, False, {"ad_model": "face_yolov8n.pt"}]}}, '"ADetailer" cannot be run here'),
        ({"ADetailer": {"args": ["true", {"ad_model": "hand.pt", "ad_tab_enable": "true"}]}}, '"ADetailer" cannot'),
        ({"AnimateDiff": {"args": [{"enable": True}]}}, '"AnimateDiff" cannot be run here: pictures are possible'),
    ],
)
def test_a_script_that_cannot_be_had_is_refused_by_name_when_it_is_on(scripts: object, sentence: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        check(alwayson_scripts=scripts)
    assert sentence in str(refused.value)


def test_what_is_off_changes_nothing() -> None:
    """As the original's client sends it: everything present, most of it at its default."""
    plain = check()
    scripts = {
        "reactor": {"args": ["", False]},
        "tiled diffusion": {"args": [False, "MultiDiffusion"]},
        "tiled vae": {"args": [False, 1536]},
        "adetailer": {"args": [False, {"ad_model": "face_yolov8n.pt"}]},
        "ADetailer": {
            "args": [True, False, {"ad_model": "face_yolov8n.pt", "ad_tab_enable": False}, {"ad_model": None}]
        },
        "controlnet": {"args": [{"enabled": False, "model": "x"}, {"enabled": True, "model": "None"}]},
        "refiner": {"args": [False, "", 0.8]},
        "seed": {"args": [-1, False, -1, 0, 0, 0]},
        "hypertile": {"args": [False]},
        "sampler": {"args": [50, "Euler", "Automatic"]},
        "mystery": {"args": [False, 0.5]},
        "no arguments": {},
    }
    off = {"restore_faces": False, "tiling": None, "s_churn": 0, "s_tmax": 1e30, "styles": [], "script_name": None}
    off |= {
        "mask_round": True,
        "seed_enable_extras": True,
        "distilled_cfg_scale": 3.5,
        "send_images": True,
        "override_settings_restore_afterwards": True,
        "comments": {},
        "infotext": None,
        "enable_hr": False,
    }
    assert check(alwayson_scripts=scripts, override_settings={}, script_args=[], **off) == plain
    assert plain["ignored"] == []


def test_what_is_off_may_be_text() -> None:
    """As bots write it, and forms."""
    texts = {"restore_faces": "false", "tiling": "False", "enable_hr": "false", "hr_upscaler": "string"}
    assert check(**texts, styles=["None"], script_name="None") == check(styles=[""]) == check()


@pytest.mark.parametrize("script", [{"args": {"model": "canny", "image": "x"}}, [{"model": "canny", "image": "x"}], 3])
def test_a_script_whose_arguments_are_no_list_does_nothing_and_is_named(script: object) -> None:
    assert check(alwayson_scripts={"controlnet": script})["ignored"] == ["script controlnet, whose args are no list"]


def test_names_of_the_checked_form_are_unknown_names_in_a_clients_payload() -> None:
    own: dict[str, object] = {
        "controlnet": [{"module": "openpose", "model": "x"}],
        "plot": {"x": {"name": "Nothing at all"}},
        "ignored": [{"steps": 1}],
        "model_name": "other",
        "vae_name": "other",
        "refiner_pass": "third",
        "clip_skip": 99,
        "noise_seed_delta": 1,
        "noise_source": "mine",
        "form": "mine",
    }
    assert check(**own) == check() | {"ignored": list(own)}


def test_what_is_ignored_has_a_name_that_can_be_stored() -> None:
    assert check(**{"a\0b": 1, "\ud800": 1, "é": 1})["ignored"] == [r'"a\u0000b"', r'"\ud800"', "é"]


def test_what_is_ignored_is_named() -> None:
    fields = check(
        styles=["noir"],
        mask_round=False,
        infotext="a cat\nSteps: 20",
        script_name="sd upscale",
        override_settings={"samples_format": "jpg", "CLIP_stop_at_last_layers": 2},
        alwayson_scripts={"dynamic prompts": {"args": [True]}},
    )
    assert fields["ignored"] == [
        "styles",
        "mask_round",
        "infotext",
        "override_settings.samples_format",
        "script dynamic prompts",
        "script sd upscale",
    ]


@pytest.mark.parametrize(
    ("task", "fields", "said"),
    [
        ("txt2img", {"override_settings": "CLIP skip 2"}, 'override_settings "CLIP skip 2": an object is wanted'),
        ("txt2img", {"alwayson_scripts": [1]}, "alwayson_scripts [1]: an object is wanted"),
        ("extra-batch-images", {"imageList": ["iVBORw"]}, 'imageList[0] "iVBORw": an object is wanted'),
    ],
)
def test_what_should_be_an_object_is_named(task: str, fields: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        check_payload(json.dumps(fields), task, JOB)
    assert str(refused.value) == said


def test_fields_of_a_second_pass_mean_nothing_to_img2img() -> None:
    """Clients send them all the same."""
    second = {"hr_sampler_name": "Use same sampler", "hr_scheduler": "Use same scheduler"}
    given = {"init_images": [encoded(noise())], "sampler_name": "DPM++ SDE", "eta": 0, **second}
    assert check_payload(json.dumps(given), "img2img", JOB).fields["ignored"] == [*second]
