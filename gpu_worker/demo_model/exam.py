"""Asks a checkpoint for pictures of scenes, through the worker's engine, and counts those that are right."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpu_worker.demo_model import SIDE
from gpu_worker.demo_model.captions import BEGINNINGS, PRAISE, dressed, worded
from gpu_worker.demo_model.judge import Sight, see
from gpu_worker.demo_model.scenes import Pixels, Scene, random_scene
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.settings import EngineSettings
from gpu_worker.files.cache import CachedModel
from services.common.payloads import Generation, check
from services.common.payloads.models import BASE, LORA

_NUM_WORDINGS = 6
_SEED = 2024


@dataclass(frozen=True)
class Question:
    """A prompt, the scene that it asks for, and what of that it names."""

    prompt: str
    scene: Scene
    names_size: bool = False
    names_place: bool = False


@dataclass(frozen=True)
class Marks:
    """How many pictures have each thing right; size and place are counted where the prompt names them."""

    num_questions: int
    right: int  # shape, colour and ground
    shape: int
    colour: int
    ground: int
    size: int
    num_sizes: int
    place: int
    num_places: int
    overlap: float  # mean intersection over union with the shape, of the figures that are one


def questions(number: int = 100, seed: int = _SEED) -> list[Question]:
    """Plain prompts: of ten, two name the size and two the place."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(number):
        scene, wording, place = random_scene(rng), int(rng.integers(_NUM_WORDINGS)), int(rng.integers(2))
        size, position = index % 10 in {0, 1}, index % 10 in {2, 3}
        found.append(Question(worded(scene, wording, size, position, place), scene, size, position))
    return found


def dressed_up(
    plain: Sequence[Question], beginnings: Sequence[str] = BEGINNINGS, around: Sequence[str] = PRAISE
) -> list[Question]:
    """The same with words around each, such as `a photo of …, masterpiece, best quality`."""
    rng = np.random.default_rng(_SEED)
    return [
        Question(dressed(asked.prompt, rng, beginnings, around), asked.scene, asked.names_size, asked.names_place)
        for asked in plain
    ]


async def pictures(
    engine: Engine, checkpoint: Path, prompts: Sequence[str], loras: Sequence[Path] = (), **payload: Any
) -> list[Pixels]:
    """A picture of each prompt, all drawn together; keyword arguments go into the payloads. The seeds are 0, 1, …"""
    usual = {"steps": 20, "sampler_name": "Euler a", "cfg_scale": 4, "width": SIDE, "height": SIDE}
    requests = [usual | {"prompt": prompt, "seed": seed} | payload for seed, prompt in enumerate(prompts)]
    kinds = {checkpoint: BASE} | dict.fromkeys(loras, LORA)
    models = [CachedModel(str(path), kind, path.name, path, "") for path, kind in kinds.items()]

    async def drawn(number: int, request: dict[str, Any]) -> Pixels:
        checked = check("txt2img", request, str(number))
        assert isinstance(checked, Generation)
        produced = await engine.run(str(number), checked, models, lambda: None, lambda _: None)
        return produced.images[0]

    return await asyncio.gather(*(drawn(number, request) for number, request in enumerate(requests)))


def marks(asked: Sequence[Question], answers: Sequence[Pixels]) -> Marks:
    """What of the answers is right."""
    sights = [(question, see(answer)) for question, answer in zip(asked, answers, strict=True)]
    seen = [(question, sight) for question, sight in sights if sight is not None]

    def count(*names: str, of: Sequence[tuple[Question, Sight]] = seen) -> int:
        return sum(all(getattr(q.scene, name) == getattr(s.scene, name) for name in names) for q, s in of)

    return Marks(
        num_questions=len(asked),
        right=count("shape", "colour", "ground"),
        shape=count("shape"),
        colour=count("colour"),
        ground=count("ground"),
        size=count("size", of=[(question, sight) for question, sight in seen if question.names_size]),
        num_sizes=sum(question.names_size for question in asked),
        place=count("position", of=[(question, sight) for question, sight in seen if question.names_place]),
        num_places=sum(question.names_place for question in asked),
        overlap=float(np.mean([sight.overlap for _, sight in seen])) if seen else 0.0,
    )


async def examine(
    checkpoint: Path, device: str, num_threads: int, papers: dict[str, list[Question]]
) -> dict[str, list[Pixels]]:
    """The answers to several sets of questions, from an engine of its own."""
    engine = Engine(EngineSettings(device, num_threads))
    engine.start()
    await engine.ready
    try:
        return {
            name: await pictures(engine, checkpoint, [question.prompt for question in paper])
            for name, paper in papers.items()
        }
    finally:
        await engine.stop()
