"""What SDXL's UNet is told of a prompt at each step: prompts of any length, changing ones, several at once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gpu_worker.models import prompt
from tests.gpu_worker.driving import assert_close, changed, drive, latents, steps_of, txt2img_of
from tests.gpu_worker.reference import Told, by_formula, pipeline_latents
from tests.gpu_worker.tables import slow
from tests.gpu_worker.tiny_sdxl import TinySdxl, make, read

REQUEST = txt2img_of(prompt="a red circle", steps=4, width=64, height=64, seed=3)
# A text by its chunks; of a negative one that is empty none.
Chunks = list[str]
# At a step: texts with weights, and the negative one.
AtStep = Callable[[int], tuple[list[tuple[Chunks, float]], Chunks]]
THREE = ["a cat", "a dog", "a fox"]
# A1111 looks texts up one step late, so the first comes twice.
ALTERNATING = ["red", "red", "blue", "red"]
# A prompt, a negative one, and what they are.
Case = tuple[str, str, AtStep]
CASES: list[Case] = [
    ("a cat", "", lambda _: ([(["a cat"], 1)], [])),
    ("a cat", "blurry", lambda _: ([(["a cat"], 1)], ["blurry"])),
    ("a cat BREAK a dog", "blurry", lambda _: ([(THREE[:2], 1)], ["blurry"])),
    ("a cat", "blurry BREAK bad BREAK dark", lambda _: ([(["a cat"], 1)], ["blurry", "bad", "dark"])),
    ("a cat BREAK a dog BREAK a fox", "blurry BREAK bad", lambda _: ([(THREE, 1)], ["blurry", "bad"])),
    # Empty at first, it is a text all the same; when it never is one, it is nothing.
    ("[a cat:a dog:0.5]", "[bad:1]", lambda step: ([([THREE[step > 2]], 1)], ["bad" if step > 1 else ""])),
    ("[red|blue]", "[:0.5]", lambda step: ([([ALTERNATING[step]], 1)], [])),
    ("a cat AND a dog :0.5", "blurry", lambda _: ([(["a cat"], 1), (["a dog"], 0.5)], ["blurry"])),
    (
        "[a cat:a dog BREAK a fox:2] AND [red|blue] :-0.3",
        "",
        lambda step: ([(THREE[1:] if step > 2 else THREE[:1], 1), ([ALTERNATING[step]], -0.3)], []),
    ),
]


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> TinySdxl:
    return make(tmp_path_factory.mktemp("sdxl") / "tiny-xl.safetensors")


@pytest.mark.parametrize("cases", [CASES[-1:], *slow([CASES])], ids=len)
def test_prompts_of_mixed_lengths_that_change_and_add_up_share_calls(sdxl: TinySdxl, cases: list[Case]) -> None:
    requests = [
        changed(REQUEST, prompt=text, negative_prompt=negative, seed=seed, sampler_name=("Euler", "Euler a")[seed % 2])
        for seed, (text, negative, _) in enumerate(cases)
    ]
    tasks = [(seed % 3, latents(request, sdxl.models)) for seed, request in enumerate(requests)]
    for request, found, (_, _, at_step) in zip(requests, drive(tasks), cases, strict=True):

        def told(step: int, at_step: AtStep = at_step) -> Told:
            texts, negative = at_step(step)
            positives = [(read(sdxl.pipeline, *chunks), weight) for chunks, weight in texts]
            return Told(sdxl.parts["unet"], positives, read(sdxl.pipeline, *negative))

        assert_close(found, by_formula(request, told))


@pytest.mark.slow
def test_each_step_is_told_its_own_texts_and_their_first_chunks_as_wholes(sdxl: TinySdxl) -> None:
    for text, negative, at_step in CASES:
        with torch.inference_mode():
            steps = steps_of(changed(REQUEST, prompt=text, negative_prompt=negative), sdxl.models)
        for number, step in enumerate(steps):
            texts, away = at_step(number)
            expected = [read(sdxl.pipeline, *chunks) for chunks in (away, *(chunks for chunks, _ in texts))]
            for told, (hidden, pooled) in zip(step.guidance.texts, expected, strict=True):
                assert told.added is not None
                assert told.text.shape == hidden.shape
                assert (told.text - hidden).abs().max() < 1e-5
                assert (told.added["text_embeds"] - pooled).abs().max() < 1e-5


def test_a_negative_prompt_in_company_is_that_of_the_diffusers_pipeline(sdxl: TinySdxl) -> None:
    requests = [
        changed(REQUEST, negative_prompt="blurry, dark", batch_size=2),
        changed(REQUEST, negative_prompt="a dog", sampler_name="DDIM", cfg_scale=3, seed=5),
        changed(REQUEST, negative_prompt="a dog", cfg_scale=1, seed=6),
    ]
    tasks = [(index, latents(request, sdxl.models)) for index, request in enumerate(requests)]
    for request, found in zip(requests, drive(tasks, max_rows=4), strict=True):
        assert_close(found, pipeline_latents(sdxl.pipeline, request.sampler_name, request))


@pytest.mark.parametrize("clip_skip", [1, 2, 12])
def test_clip_skip_changes_nothing(sdxl: TinySdxl, clip_skip: int) -> None:
    """SDXL was trained with the last layer but one of both encoders, which A1111 reads whatever the setting says."""
    outputs: list[Any] = []
    with torch.inference_mode():
        found, pooled = prompt.encode(sdxl.models, "a cat", clip_skip)
        for part, encoder in zip(("text_encoder", "text_encoder_2"), sdxl.models.text_encoders, strict=True):
            tokens = encoder.tokenizer("a cat", padding="max_length", max_length=77, return_tensors="pt").input_ids
            outputs.append(sdxl.parts[part](tokens, output_hidden_states=True))
    assert torch.equal(found, torch.cat([output.hidden_states[-2] for output in outputs], -1))
    assert pooled is not None
    assert torch.equal(pooled, outputs[1].text_embeds)
