"""The UNet call over rows that differ in everything, against the UNet called for each of them by itself."""

from pathlib import Path

import pytest
import torch

from gpu_worker.engine.denoise import Conditioning, Evaluation, Guidance, Step, predict
from gpu_worker.models import weights
from tests.gpu_worker.conftest import as_cached
from tests.gpu_worker.driving import assert_close


@pytest.fixture(scope="module")
def models(tiny_checkpoint: Path) -> weights.Models:
    return weights.load(as_cached(tiny_checkpoint), None, "cpu")


def text(num_chunks: int, seed: int) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    return Conditioning(torch.randn((1, 77 * num_chunks, 32), generator=generator), None)


def wish(
    models: weights.Models, index: int, num_chunks: tuple[int, ...], cfg_scale: float = 5.0, num_rows: int = 1
) -> Evaluation:
    """`num_chunks` of the text, of the negative text, and of further texts."""
    x = torch.randn((num_rows, 4, 8, 8), generator=torch.Generator().manual_seed(index))
    negative = text(num_chunks[1], 100 + index) if cfg_scale > 1 else None
    texts = [num_chunks[0], *num_chunks[2:]]
    positives = tuple((text(length, index + 1000 * number), 1.0 - 0.4 * number) for number, length in enumerate(texts))
    guidance = Guidance(positives, negative, cfg_scale)
    return Evaluation(x, 999.0 - 137.25 * index, Step(models.unet, guidance), shares=(1.0, -1.0))


def alone(models: weights.Models, wish: Evaluation) -> torch.Tensor:
    """Guidance as in the papers, with one UNet call for each row and text. Without a negative text there is no scale,
    and further texts lead away from the first."""
    rows = []
    for row in wish.x:

        def output(conditioning: Conditioning, row: torch.Tensor = row) -> torch.Tensor:
            result: torch.Tensor = models.unet(row[None], torch.tensor(wish.timestep), conditioning.text).sample
            return result

        steering = wish.guidance
        scale = 1.0 if steering.negative is None else steering.cfg_scale
        start = output(steering.negative or steering.positives[0][0])
        led = [weight * (output(positive) - start) for positive, weight in steering.positives]
        rows.append(start + scale * torch.stack(led).sum(0))
    return torch.cat(rows)


@pytest.mark.parametrize("max_rows", [1, 3, 64])
def test_rows_of_any_guidance_prompt_length_and_timestep_have_the_predictions_of_calls_of_their_own(
    models: weights.Models, max_rows: int
) -> None:
    wishes = [
        wish(models, 0, (1, 1)),
        wish(models, 1, (3, 1), cfg_scale=1.0),
        wish(models, 2, (1, 2), num_rows=2),
        wish(models, 3, (2, 3), cfg_scale=7.5),
        wish(models, 4, (5, 1)),
        wish(models, 5, (7, 7), cfg_scale=0.0),
        wish(models, 6, (14, 1), num_rows=2),
        wish(models, 7, (1, 1, 2, 1), num_rows=2),
        wish(models, 8, (1, 1, 2), cfg_scale=1.0),
    ]
    with torch.inference_mode():
        for found, one in zip(predict(wishes, max_rows), wishes, strict=True):
            assert_close(found, alone(models, one))


def test_prompt_lengths_with_a_reasonable_common_multiple_share_a_call(models: weights.Models) -> None:
    calls: list[tuple[int, ...]] = []

    def before(_: object, arguments: tuple[torch.Tensor, ...], options: dict[str, torch.Tensor]) -> None:
        calls.append((len(arguments[0]), options["encoder_hidden_states"].shape[1] // 77))

    hook = models.unet.register_forward_pre_hook(before, with_kwargs=True)
    with torch.inference_mode():
        predict(
            [wish(models, 0, (1, 1)), wish(models, 1, (2, 1)), wish(models, 2, (3, 1)), wish(models, 3, (1, 4))], 64
        )
        predict([wish(models, 0, (4, 4)), wish(models, 1, (5, 5))], 64)
    hook.remove()
    assert calls == [(8, 12), (2, 4), (2, 5)]
