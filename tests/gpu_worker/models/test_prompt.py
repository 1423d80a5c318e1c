"""A1111's prompt syntax, and texts as the UNet reads them against diffusers' own encoding."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_worker.job import JobError
from gpu_worker.models import prompt, weights
from tests.gpu_worker.conftest import as_cached
from tests.gpu_worker.driving import assert_close, changed, drive, latents, txt2img_of
from tests.gpu_worker.reference import Text, Told, by_formula, pipeline_of
from tests.gpu_worker.tables import slow
from tests.gpu_worker.test_sdxl_texts import CASES, AtStep, Case

PLAIN = ["", "a cat", "A photo, of: a cat; 8k B&W -- 'x'  y\n z", "été 猫 🐈 1:2", "word, " * 37]


@pytest.fixture(scope="module")
def models(tiny_checkpoint: Path) -> weights.Models:
    return weights.load(as_cached(tiny_checkpoint), None, "cpu")


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint: Path, models: weights.Models, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return pipeline_of(tiny_checkpoint, models.text_encoders[0].tokenizer, tmp_path_factory.mktemp("config"))


def pieces(text: str) -> list[tuple[str, float]]:
    return [(piece.text, round(piece.weight, 6)) for piece in prompt.parse(text)]


@torch.inference_mode()
def encoded(models: weights.Models, text: str, clip_skip: int = 1) -> torch.Tensor:
    return prompt.encode(models, text, clip_skip)[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat", [("a cat", 1)]),
        ("a (cat)", [("a ", 1), ("cat", 1.1)]),
        ("((a)) [b] [[c]]", [("a", 1.21), (" ", 1), ("b", 0.909091), (" ", 1), ("c", 0.826446)]),
        ("(a:1.3) (b: .5 ) (c:-1)", [("a", 1.3), (" ", 1), ("b", 0.5), (" ", 1), ("c", -1)]),
        ("(a (b:2) c)", [("a ", 1.1), ("b", 2.2), (" c", 1.1)]),
        ("(a, [b:2])", [("a, ", 1.1), ("b:2", 1)]),
        (r"a \(cat\) \[b\] \\ \x_\_y", [(r"a (cat) [b] \ x__y", 1)]),
        ("(a [b, c:1.3) d", [("a ", 1.3), ("b, c", 1.181818), (" d", 0.909091)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1), (" c", 0.909091)]),
        ("a (b [c", [("a ", 1), ("b ", 1.1), ("c", 1)]),
        ("a) b] c:1.5) d", [("a) b] c:1.5) d", 1)]),
        ("time 12:30 (now:)", [("time 12:30 ", 1), ("now:", 1.1)]),
        ("a BREAK b", [("a", 1), ("", 1), ("b", 1)]),
        ("BREAKFAST aBREAK", [("BREAKFAST aBREAK", 1)]),
        ("", []),
        ("()", []),
    ],
)
def test_weights_brackets_escapes_and_breaks(text: str, expected: list[tuple[str, float]]) -> None:
    assert pieces(text) == expected


@pytest.mark.parametrize("text", PLAIN)
def test_a_plain_prompt_is_encoded_as_by_diffusers_bit_for_bit(
    pipeline: Any, models: weights.Models, text: str
) -> None:
    expected = pipeline.encode_prompt(text, "cpu", 1, False)[0]
    assert torch.equal(encoded(models, text), expected)


def test_weights_scale_tokens_and_keep_the_mean(models: weights.Models) -> None:
    plain, weighed = encoded(models, "a cat on"), encoded(models, "a (cat:1.5) on")
    factors = torch.ones(77, 1)
    factors[2] = 1.5
    expected = plain * factors
    assert torch.allclose(weighed, expected * (plain.mean() / expected.mean()))
    assert weighed.mean().item() == pytest.approx(plain.mean().item(), rel=1e-4)


def test_a_mean_that_is_nothing_but_rounding_is_not_restored(models: weights.Models) -> None:
    bias = models.text_encoders[0].model.final_layer_norm.bias
    with torch.inference_mode():
        before = bias.clone()
        bias.zero_()
        plain, weighed = encoded(models, "a cat on"), encoded(models, "a (cat:1.5) on")
        bias.copy_(before)
    factors = torch.ones(77, 1)
    factors[2] = 1.5
    assert torch.equal(weighed, plain * factors)


def test_nothing_waits_for_what_the_device_makes_of_a_text(models: weights.Models) -> None:
    class Reads(TorchDispatchMode):
        """Refuses to bring a number of a tensor to the host."""

        def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func not in {torch.ops.aten.is_nonzero.default, torch.ops.aten.item.default}
            return func(*args, **(kwargs or {}))

    expected = encoded(models, "a (cat:1.5) on")
    with Reads():
        assert encoded(models, "a (cat:1.5) on").shape == expected.shape


def test_a_long_prompt_is_read_in_chunks_that_end_at_a_comma(models: weights.Models) -> None:
    words = "dog " * 70
    first, second = f"{words.strip()},", "cat " * 20
    both = encoded(models, f"{first} {second}")
    assert both.shape[1] == 2 * 77
    assert torch.allclose(both, torch.cat([encoded(models, first), encoded(models, second)], dim=1), atol=1e-6)
    without = encoded(models, "dog " * 90)  # no comma: a chunk is full
    assert torch.allclose(without[:, :77], encoded(models, "dog " * 75), atol=1e-6)
    far = encoded(models, f"dog, {'cat ' * 80}")  # a comma too far back
    assert torch.allclose(far[:, :77], encoded(models, f"dog, {'cat ' * 73}"), atol=1e-6)


def test_break_begins_a_chunk(models: weights.Models) -> None:
    found = encoded(models, "a cat BREAK (a dog:1.2)")
    expected = torch.cat([encoded(models, "a cat"), encoded(models, "(a dog:1.2)")], dim=1)
    assert torch.allclose(found, expected, atol=1e-6)
    assert encoded(models, "a cat BREAK").shape[1] == 77


def test_clip_skip_reads_an_earlier_layer_through_the_last_norm(models: weights.Models) -> None:
    encoder = models.text_encoders[0]
    tokens = encoder.tokenizer("a cat", padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.inference_mode():
        hidden = encoder.model(tokens, output_hidden_states=True).hidden_states
        expected = encoder.model.final_layer_norm(hidden[-2])
    assert torch.equal(encoded(models, "a cat", clip_skip=2), expected)
    assert not torch.equal(encoded(models, "a cat"), expected)
    assert encoded(models, "a cat", clip_skip=12).shape == expected.shape  # deeper than a tiny encoder


def test_a_prompt_without_end_is_refused(models: weights.Models) -> None:
    with pytest.raises(JobError, match="at most 64 are possible"):
        encoded(models, "BREAK " * 65 + "end")


@pytest.mark.parametrize("cases", [CASES[-1:], *slow([CASES])], ids=len)
def test_texts_that_change_and_add_up_have_the_latents_of_a_loop_that_exchanges_them(
    pipeline: Any, models: weights.Models, cases: list[Case]
) -> None:
    request = txt2img_of(steps=4, width=64, height=64)
    requests = [
        changed(request, prompt=text, negative_prompt=negative, seed=seed, sampler_name=("Euler", "Euler a")[seed % 2])
        for seed, (text, negative, _) in enumerate(cases)
    ]

    def read(chunks: list[str]) -> Text:
        found = [pipeline.encode_prompt(chunk, "cpu", 1, False)[0] for chunk in chunks or [""]]
        return torch.cat(found, dim=1), None

    tasks = [(seed % 3, latents(request, models)) for seed, request in enumerate(requests)]
    for request, found, (_, _, at_step) in zip(requests, drive(tasks), cases, strict=True):

        def told(step: int, at_step: AtStep = at_step) -> Told:
            texts, negative = at_step(step)
            return Told(pipeline.unet, [(read(chunks), weight) for chunks, weight in texts], read(negative))

        assert_close(found, by_formula(request, told))
