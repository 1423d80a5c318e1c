"""The committed checkpoint: it draws what prompts say, in the worker's engine and in the stock pipeline alike."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gpu_worker import demo_model
from gpu_worker.demo_model import architecture
from gpu_worker.demo_model.exam import Question, dressed_up, marks, pictures, questions
from gpu_worker.engine.engine import Engine
from gpu_worker.models import ldm, weights
from tests.gpu_worker.driving import assert_close, drive, latents, txt2img_of
from tests.gpu_worker.reference import pipeline_latents, pipeline_of

PLAIN = questions()
# Ways and words that its training never had.
STRANGE_BEGINNINGS = ("a snapshot of", "a postcard showing", "a mural with", "an etching of")
STRANGE_WORDS = ("ray tracing", "pixiv", "kodak portra", "insanely intricate", "f/1.8", "matte", "trending", "moody")


async def answers(engine: Engine, asked: list[Question]) -> list[np.ndarray]:
    return await pictures(engine, demo_model.CHECKPOINT, [question.prompt for question in asked])


def test_it_is_small_and_of_the_committed_architecture() -> None:
    assert demo_model.CHECKPOINT.stat().st_size <= 20_000_000
    state, metadata = weights.read(demo_model.CHECKPOINT, "demo")
    assert set(metadata) == {weights.CONFIG_METADATA}
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert weights._config(state, metadata, "demo") == architecture.config()


def test_it_holds_what_the_models_hold_under_the_original_names(models: weights.Models) -> None:
    parts = models.unet, models.vae, models.text_encoders[0].model
    state, _ = weights.read(demo_model.CHECKPOINT, "demo")
    again = ldm.checkpoint(architecture.config(), *parts)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


@pytest.mark.slow
async def test_of_a_hundred_pictures_95_are_right_and_90_with_words_around_the_prompts(engine: Engine) -> None:
    assert marks(PLAIN, await answers(engine, PLAIN)).right >= 95
    dressed = dressed_up(PLAIN[::2]) + dressed_up(PLAIN[1::2], STRANGE_BEGINNINGS, STRANGE_WORDS)
    assert marks(dressed, await answers(engine, dressed)).right >= 90


@pytest.mark.slow
async def test_the_stock_pipeline_draws_the_same_pictures(models: weights.Models, tmp_path: Path) -> None:
    stock = pipeline_of(demo_model.CHECKPOINT, models.text_encoders[0].tokenizer, tmp_path)
    request = txt2img_of(prompt=demo_model.PROMPT, negative_prompt="blurry", steps=12, width=64, height=64, seed=3)
    ours = drive([(0, latents(request, models))])[0]
    scheduler = stock.scheduler
    assert_close(ours, pipeline_latents(stock, request.sampler_name, request))
    stock.scheduler = scheduler
    asked = PLAIN[:10]
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(asked))]
    prompts = [question.prompt for question in asked]
    shown = stock(prompts, num_inference_steps=20, guidance_scale=4, generator=generators, output_type="np").images
    assert marks(asked, [(image * 255).round().astype(np.uint8) for image in shown]).right >= 9
