"""Owns how a test advances tasks without an engine: alone, or in company that joins and leaves between ticks."""

from collections.abc import Generator
from dataclasses import replace
from typing import Any, TypeVar

import torch

from gpu_worker.engine.denoise import Step, predict
from gpu_worker.models import weights
from gpu_worker.models.adapters import Adapters, Equipped
from gpu_worker.pictures import hints
from gpu_worker.pictures.canvas import Canvas
from gpu_worker.tasks import img2img, steering, txt2img
from gpu_worker.tasks.steering import Crew
from services.common.payloads import Generation, Img2Img, Txt2Img, check

NO_ADAPTERS = Adapters()
R = TypeVar("R")
G = TypeVar("G", bound=Generation)


def drive(tasks: list[tuple[int, Generator[Any, Any, Any]]], max_rows: int = 64) -> list[Any]:
    """Runs tasks to their ends, each joining at the tick given with it, and answers what each returned."""
    results: dict[int, Any] = {}
    wishes: dict[int, Any] = {}

    def advance(index: int, prediction: Any) -> None:
        wishes.pop(index, None)
        try:
            while (wish := tasks[index][1].send(prediction)) is None:
                prediction = None
            wishes[index] = wish
        except StopIteration as end:
            results[index] = end.value

    tick = 0
    with torch.inference_mode():
        while len(results) < len(tasks):
            for index, (joins_at, _) in enumerate(tasks):
                if joins_at == tick:
                    advance(index, None)
            for group in {wish.group for wish in wishes.values()}:
                active = [index for index, wish in wishes.items() if wish.group == group]
                predictions = predict([wishes[index] for index in active], max_rows)
                for index, prediction in zip(active, predictions, strict=True):
                    advance(index, prediction)
            tick += 1
    return [results[index] for index in range(len(tasks))]


def finished(task: Generator[None, Any, R]) -> R:
    """What a task without wishes returns."""
    try:
        while True:
            next(task)
    except StopIteration as end:
        found: R = end.value
        return found


def txt2img_of(**fields: Any) -> Txt2Img:
    """The request of a txt2img payload."""
    request = check("txt2img", fields, "job")
    assert isinstance(request, Txt2Img)
    return request


def img2img_of(**fields: Any) -> Img2Img:
    """The request of an img2img payload."""
    request = check("img2img", fields, "job")
    assert isinstance(request, Img2Img)
    return request


def changed(request: G, **changes: Any) -> G:
    """The request with other values, checked again."""
    return type(request).model_validate(request.model_dump() | changes)


def crew(models: weights.Models, adapters: Adapters = NO_ADAPTERS, refiner: weights.Models | None = None) -> Crew:
    """A crew of models without a run."""
    return Crew(Equipped(models, adapters), Equipped(refiner) if refiner else None)


def steps_of(request: Generation, models: weights.Models) -> list[Step]:
    """What each step of a request without a picture is made with."""
    return steering.steps_of(request, crew(models), Canvas())


def latents(
    request: Txt2Img, models: weights.Models, adapters: Adapters = NO_ADAPTERS, refiner: weights.Models | None = None
) -> Generator[Any, Any, torch.Tensor]:
    """The task of a request's first batch up to its final latents."""
    models = replace(models, tiling=request.tiling)
    steps = steering.steps_of(request, crew(models, adapters, refiner), hints.prepared(request))
    return (yield from txt2img.denoised(request, models, steps, 0, lambda _: None))


def img2img_latents(
    request: Img2Img, models: weights.Models, adapters: Adapters = NO_ADAPTERS
) -> Generator[Any, Any, torch.Tensor]:
    """The task of a request's first batch up to its final latents."""
    canvas = hints.prepared(request)
    originals = img2img.encoded(request, canvas, models)
    steps = steering.steps_of(request, crew(models, adapters), canvas)
    return (yield from img2img.denoised(request, canvas, models, originals, steps, 0, lambda _: None))


def assert_close(found: torch.Tensor, expected: torch.Tensor, least: float = 0.0) -> None:
    """Equal to 1e-5 of the largest value, or of `least` where noise of that size was in small ones and has gone."""
    error = ((found - expected).abs().max() / expected.abs().max().clamp(min=least)).item()
    assert error <= 1e-5, error
