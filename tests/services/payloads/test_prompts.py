"""A1111's prompt syntax beside words: networks, AND, texts that change on the way; and which models a request uses."""

import math
from typing import Any

import pytest

from services.common.errors import InvalidArgument
from services.common.payloads import check, used
from services.common.payloads.models import find
from services.common.payloads.prompts import NetworkTag, Prompt, at_step, joined_by_and, read

LONG = 200_000
MODELS = [
    ("Stable-diffusion", "v1-5.safetensors"),
    ("Stable-diffusion", "other.ckpt"),
    ("Lora", "style.safetensors"),
    ("Lora", "face.v2.safetensors"),
    ("hypernetworks", "mood.pt"),
    ("embeddings", "BadHands.pt"),
    ("VAE", "Automatic"),
    ("VAE", "ft-mse.safetensors"),
]


@pytest.mark.parametrize(
    ("tag", "network"),
    [
        ("<lora:x>", NetworkTag("x", 1.0, 1.0)),
        ("<lora:x:0.8>", NetworkTag("x", 0.8, 0.8)),
        ("<lora:x:0.8:0.5>", NetworkTag("x", 0.8, 0.5)),
        ("<lora:x:-1>", NetworkTag("x", -1.0, -1.0)),
        ("<lora:x:te=0.2:unet=.7>", NetworkTag("x", 0.2, 0.7)),
        ("<lora:a name.v2:1>", NetworkTag("a name.v2", 1.0, 1.0)),
        ("<lyco:x:0.8>", NetworkTag("x", 0.8, 0.8)),
        ("<hypernet:x:0.8>", NetworkTag("x", 0.8, 0.8, "hypernet")),
    ],
)
def test_a_tag_names_a_network_and_its_scales(tag: str, network: NetworkTag) -> None:
    found = read(f"a cat {tag}, <style:h:1> (big:1.2)")
    assert found.networks == (network,)
    assert found.text == "a cat ,  (big:1.2)"
    assert found.ignored == ("<style:h:1>",)


@pytest.mark.parametrize("tag", ["<lora:x:1:1:8>", "<lora:x:1:dyn=8>", "<lora:x:1:lbw=OUTALL>"])
def test_what_a_tag_of_a_lora_asks_for_beside_its_scales_is_named(tag: str) -> None:
    assert read(tag) == Prompt("", (NetworkTag("x"),), (f"{tag}: all but its scales",))
    request = check("txt2img", {"enable_hr": True, "hr_prompt": tag}, "job")
    assert request.model_dump()["ignored"] == [f"{tag}: all but its scales"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a cat # of mine\n#<lora:x:1>\nblue", "a cat \n\nblue"),
        ("#only this", ""),
        ("a cat", "a cat"),
    ],
)
def test_comments_are_no_part_of_a_prompt(text: str, said: str) -> None:
    names = ("prompt", "negative_prompt", "hr_prompt", "hr_negative_prompt")
    prompts = dict.fromkeys(names, text) | {"enable_hr": True}
    fields = check("txt2img", prompts, "job").model_dump()
    assert [fields[name] for name in names] == [said] * 4
    assert fields["ignored"] == []
    assert check("txt2img", fields, "job").model_dump() == fields


def test_a_prompt_has_no_comments_where_the_settings_say_so() -> None:
    settings = {"override_settings": {"enable_prompt_comments": False}}
    fields = check("txt2img", {"prompt": "a #1 cat", **settings}, "job").model_dump()
    assert (fields["prompt"], fields["ignored"]) == ("a #1 cat", [])
    assert check("txt2img", fields, "job").model_dump() == fields


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("a [cat:dog:0.5]", ["a cat", "a cat", "a cat", "a dog"]),
        ("a [cat:dog:1]", ["a cat", "a cat", "a dog", "a dog"]),
        ("a [cat:dog:0.0]", ["a dog"] * 4),
        ("a [cat:dog:0.2]", ["a dog"] * 4),
        ("a [cat:dog:1.0]", ["a cat"] * 4),
        ("a [in:2]", ["a ", "a ", "a ", "a in"]),
        ("a [out::0.25]", ["a out", "a out", "a ", "a "]),
        ("[cow|horse]", ["cow", "cow", "horse", "cow"]),
        ("[a|b|]", ["a", "a", "b", ""]),
        ("[[a:b:1]:[c|d]:2]", ["a", "a", "b", "c"]),
        ("[(a:1.2):b:2]", ["(a:1.2)", "(a:1.2)", "(a:1.2)", "b"]),
        ("[a] (b:1.3) [c:d] \\[e:f:1]", ["[a] (b:1.3) [c:d] \\[e:f:1]"] * 4),
        ("[a:b:1", ["[a:b:1"] * 4),
        ("a] [b:1]", ["a] ", "a] ", "a] b", "a] b"]),
    ],
)
def test_a_text_changes_on_the_way(text: str, steps: list[str]) -> None:
    assert [at_step(text, step, 4) for step in range(4)] == steps


@pytest.mark.parametrize("text", ["[" * LONG, "[" * LONG + "]" * LONG, "(" * LONG + ")" * LONG, ":" * LONG, " " * LONG])
def test_a_hostile_text_is_read_in_a_time_that_grows_with_it(text: str) -> None:
    """What grew with its square would be cut off by the tests' timeout."""
    assert at_step(text, 1, 4) == text
    assert joined_by_and(text) == [(text, 1.0)]
    assert read(text).text == text


def test_hostile_numbers_are_read_in_a_time_that_grows_with_them() -> None:
    digits = "1" * LONG
    assert joined_by_and(f"a:{digits}x") == [(f"a:{digits}x", 1.0)]
    assert joined_by_and(f"a:{digits}") == [("a", math.inf)]
    assert at_step(f"[a:b:{digits}][c:-{digits}][d:{digits}x]", 3, 4) == f"ac[d:{digits}x]"
    assert at_step("[a|" * LONG + "b" + "]" * LONG, 2, 4) == "b"


def test_steps_count_as_in_a1111() -> None:
    """Its entries are (last step, text); the first whose last step is not before the sampler's, from 0, is read."""
    entries = [(10, "cat"), (20, "dog")]
    expected = [next(text for end, text in entries if step <= end) for step in range(20)]
    assert expected.count("cat") == 11
    assert [at_step("[cat:dog:0.5]", step, 20) for step in range(20)] == expected
    alternating = [(end, "ab"[(end - 1) % 2]) for end in range(1, 21)]
    expected = [next(text for end, text in alternating if step <= end) for step in range(20)]
    assert [at_step("[a|b]", step, 20) for step in range(20)] == expected


def test_texts_are_joined_by_and_with_weights() -> None:
    assert joined_by_and("a cat :0.5 AND (dog:1.2)AND sAND") == [("a cat", 0.5), (" (dog:1.2)", 1.0), (" sAND", 1.0)]
    request = check("txt2img", {"prompt": "a AND b :0.3", "cfg_scale": 1}, "job")
    assert request.is_guided
    assert request.num_pixels == 3 * 512 * 512


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"prompt": "<lora:x:much>"}, '<lora:x:much>: "much" is no number; possible: <lora:name:1>'),
        ({"prompt": " AND ".join("abcdefghi")}, "prompt joins 9 texts with AND; at most 8 are possible"),
        (
            {"prompt": "<lora:a:1><hypernet:a:1>" * 51},
            "prompt names 102 LoRAs and hypernetworks; at most 100 are possible",
        ),
        ({"prompt": "a" * 10_001}, "prompt has 10001 characters; at most 10000 are possible"),
        (
            {"enable_hr": True, "hr_negative_prompt": "a" * 10_001},
            "hr_negative_prompt has 10001 characters; at most 10000 are possible",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        check("txt2img", fields, "job")
    assert sentence in str(refused.value)


def names(**fields: Any) -> list[str]:
    return [MODELS[index][1] for index in used(check("txt2img", fields, "job"), MODELS)]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("face", "face.safetensors"),
        ("face.v2", "face.v2.safetensors"),
        ("face.v2.safetensors", "face.v2.safetensors"),
        ("face.v2 [0a1b2c]", "face.v2.safetensors"),
        ("folder/face.v2.safetensors [0a1b2c]", "face.v2.safetensors"),
        ("face.pt", "face.safetensors"),
        ("face.v2.ckpt", "face.v2.safetensors"),
        ("xl_1.0 [7440042bbd]", "xl_1.0.ckpt"),
    ],
)
def test_a_model_is_found_by_its_name_whatever_dots_that_has(name: str, file: str) -> None:
    files = ["face.safetensors", "face.v2.safetensors", "xl_1.0.ckpt"]
    for kind in ("Stable-diffusion", "Lora", "ControlNet"):
        assert files[find([(kind, known) for known in files], kind, name, "field")] == file


def test_a_controlnet_is_found_by_its_beginning() -> None:
    files = [("ControlNet", f"control_v1.1_{name}.pth") for name in ("depth", "canny_fp16")]
    assert find(files, "ControlNet", "control_v1.1_canny [0a1b2c]", "field") == 1


@pytest.mark.parametrize(
    ("prompt", "is_used"),
    [
        ("a cat, (badHands:1.2)", True),
        ("badhands2", True),
        ("badhandsome", False),
        ("abadhands", False),
        ("<style:badhands:1>", False),
    ],
)
def test_an_embedding_is_used_where_its_name_is_a_word(prompt: str, is_used: bool) -> None:
    assert ("BadHands.pt" in names(prompt=prompt)) == is_used
    assert ("BadHands.pt" in names(enable_hr=True, hr_negative_prompt=prompt)) == is_used


def test_an_embedding_is_found_by_a_name_with_brackets() -> None:
    models = [*MODELS, ("embeddings", "Hands (v2).pt")]
    assert used(check("txt2img", {"prompt": r"a cat, (hands \(v2\):1.2)"}, "job"), models)[-1] == len(MODELS)


def test_a_request_uses_the_models_that_it_names() -> None:
    assert names() == ["v1-5.safetensors", "ft-mse.safetensors"]
    assert names(override_settings={"sd_vae": "None"}) == ["v1-5.safetensors"]
    assert names(override_settings={"sd_vae": "ft-mse.safetensors", "sd_model_checkpoint": "other [abc123]"}) == [
        "other.ckpt",
        "ft-mse.safetensors",
    ]
    assert names(prompt="<lora:face.v2:1> x <lora:style:0.5>", negative_prompt="badhands")[2:] == [
        "face.v2.safetensors",
        "style.safetensors",
        "BadHands.pt",
    ]
    assert names(prompt="<hypernet:mood:1>", enable_hr=True, hr_prompt="<lora:style:1>")[2:] == [
        "mood.pt",
        "style.safetensors",
    ]
    fields = {"prompt": "<lora:style:1> <hypernet:mood:1>", "disable_extra_networks": True}
    assert len(names(**fields)) == 2
    assert check("txt2img", fields, "job").ignored == ["<lora:style>", "<hypernet:mood>"]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"prompt": "<hypernet:style:1>"},
            "<hypernet:style> names style, which is not among the job's models of type hyp",
        ),
        (
            {"prompt": "<lora:stile:1>"},
            "<lora:stile> names stile, which is not among the job's models of type Lora; there: style.safe",
        ),
        ({"override_settings": {"sd_vae": " " * LONG + "x"}}, "override_settings.sd_vae names   "),
        (
            {"override_settings": {"sd_vae": "x.pt"}},
            "override_settings.sd_vae names x.pt, which is not among the job's",
        ),
        (
            {"override_settings": {"sd_model_checkpoint": "x"}},
            "not among the job's models of type Stable-diffusion; the",
        ),
    ],
)
def test_a_model_that_the_job_does_not_have_is_refused_by_name(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        names(**fields)
    assert sentence in str(refused.value)
