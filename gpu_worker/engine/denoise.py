"""The tick: one UNet call over the rows of many jobs, each at its own timestep, guidance scale and prompt length.

A task (`tasks/`) is a generator. It yields an `Evaluation` when it needs the UNet and is sent the guided prediction, or
yields None where others may go first. Nothing here mixes rows, so a job's latents do not depend on its company beyond
the last bits that the size of a matrix product changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import islice
from typing import Any, TypeVar

import torch

from gpu_worker.devices import on_device
from gpu_worker.engine.graphs import Graphs
from gpu_worker.models.controlnet import Control, Residuals
from gpu_worker.models.lora import Change, Network, applied
from gpu_worker.models.tiling import circular
from gpu_worker.sampling.samplers import Sampling

T = TypeVar("T")
# What is changed of clean latents.
Correction = Callable[[torch.Tensor], torch.Tensor]
Task = Generator["Evaluation | None", torch.Tensor | None, T]

CHUNK_TOKENS = 77
LATENT_SCALE = 8  # pixels per latent, both ways
# Prompts of 2 and 3 chunks meet at 6; a call whose common length would be larger becomes two calls.
_MAX_CHUNKS = 12


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What the UNet is told: the text of shape (1, 77 x chunks, width), and for SDXL the pooled text and sizes, each of
    shape (1, n)."""

    text: torch.Tensor
    added: dict[str, torch.Tensor] | None

    @property
    def num_chunks(self) -> int:
        """Chunks of 77 tokens."""
        return self.text.shape[1] // CHUNK_TOKENS


@dataclass(frozen=True, eq=False)
class Guidance:
    """What steers a prediction: texts with weights, the text to lead away from, and networks for the UNet with their
    scales. Without a negative text there is no row for it, and of several texts the first is in its place."""

    positives: tuple[tuple[Conditioning, float], ...]
    negative: Conditioning | None
    cfg_scale: float
    networks: tuple[tuple[Network, float], ...] = ()

    @property
    def without_negative(self) -> Guidance:
        """The same, without the text to lead away from."""
        return replace(self, negative=None)

    @property
    def texts(self) -> list[Conditioning]:
        """One for each part of the rows, the negative first."""
        positives = [text for text, _ in self.positives]
        return positives if self.negative is None else [self.negative, *positives]

    def guided(self, outputs: list[torch.Tensor]) -> torch.Tensor:
        """Classifier-free guidance (Ho & Salimans 2022, equation 6) over the outputs for `texts`; of several texts the
        differences add up (Liu et al. 2022, equation 11)."""
        if len(outputs) == 1:
            return outputs[0]
        if self.negative is None:
            negative, positives, cfg_scale = outputs[0], outputs, 1.0
        else:
            (negative, *positives), cfg_scale = outputs, self.cfg_scale
        weighted = zip(positives, self.positives, strict=True)
        return negative + sum(cfg_scale * weight * (output - negative) for output, (_, weight) in weighted)


@dataclass(frozen=True, eq=False)
class Step:
    """What a step is made with. In the middle of a job it may be another UNet than before."""

    unet: Any
    guidance: Guidance
    # An inpainting UNet's other channels: the mask and the latents of what stays, (rows, 5, height/8, width/8).
    context: torch.Tensor | None = None
    # ControlNets that have a say in it; sorted, so that those of two jobs meet.
    controls: tuple[Control, ...] = ()
    tiling: bool = False
    # What is changed of the clean latents that a prediction means.
    corrections: tuple[Correction, ...] = ()
    # Below this noise level every other evaluation goes without the negative text.
    unguided_below: float = 0.0

    @property
    def without_negative(self) -> Step:
        """The same, without the text to lead away from."""
        return replace(self, guidance=self.guidance.without_negative)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A wish for the prediction at latents of shape (rows, 4, height/8, width/8) that share timestep and step. `shares`
    are those of the latents and of the prediction in the clean latents that this means."""

    x: torch.Tensor
    timestep: float
    step: Step
    shares: tuple[float, float]

    def clean(self, prediction: torch.Tensor) -> torch.Tensor:
        """The clean latents that a prediction means, in fp32."""
        of_x, of_prediction = self.shares
        return of_x * self.x + of_prediction * prediction

    def meaning(self, clean: torch.Tensor) -> torch.Tensor:
        """The prediction that means these clean latents."""
        of_x, of_prediction = self.shares
        return (clean - of_x * self.x) / of_prediction

    @property
    def input(self) -> torch.Tensor:
        """The UNet's input for one text."""
        context = self.step.context
        return self.x if context is None else torch.cat([self.x, context], 1)

    @property
    def guidance(self) -> Guidance:
        """What steers the prediction."""
        return self.step.guidance

    @property
    def group(self) -> Hashable:
        """Equal for evaluations that can share a UNet call."""
        nets = tuple(id(control.net) for control in self.step.controls)
        return id(self.step.unet), self.size, self.step.tiling, nets

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the picture, in pixels."""
        return self.x.shape[3] * LATENT_SCALE, self.x.shape[2] * LATENT_SCALE

    @property
    def row_pixels(self) -> int:
        """Pixels of one row."""
        return self.size[0] * self.size[1]

    @property
    def num_rows(self) -> int:
        """Rows that this takes in a UNet call."""
        return len(self.x) * len(self.guidance.texts)


@dataclass(frozen=True)
class _Part:
    """Rows of one evaluation with one text."""

    x: torch.Tensor
    timestep: float
    text: Conditioning
    networks: tuple[tuple[Network, float], ...]
    controls: tuple[Control, ...]
    is_negative: bool


def denoise(
    sampling: Sampling,
    latents: torch.Tensor,
    steps: Sequence[Step],
    on_evaluation: Callable[[int], None],
    keep: Correction | None = None,
) -> Generator[Evaluation, torch.Tensor, torch.Tensor]:
    """Takes a job's latents from the sampler's first noise level to its last, and returns them, fp32.

    The last of the steps holds for any further. `on_evaluation` hears how many of the sampler's evaluations are done.
    `keep` puts back what is not to be changed, where a prediction leads to and at the end.
    """
    for index, timestep in enumerate(sampling.timesteps):
        x = sampling.scaled(latents, index)
        step = steps[min(sampling.step_of(index), len(steps) - 1)]
        if index % 2 and sampling.noise_level(index) < step.unguided_below:
            step = step.without_negative
        evaluation = Evaluation(x, timestep, step, sampling.shares(index))
        prediction = yield evaluation
        corrections = step.corrections if keep is None else (*step.corrections, keep)
        if corrections:
            clean = reduce(lambda clean, correct: correct(clean), corrections, evaluation.clean(prediction))
            prediction = evaluation.meaning(clean)
        latents = sampling.step(prediction, index, latents)
        on_evaluation(index + 1)
    return latents if keep is None else keep(latents)


def predict(evaluations: list[Evaluation], max_rows: int, graphs: Graphs | None = None) -> list[torch.Tensor]:
    """The guided predictions in fp32 of evaluations of one group, in as few UNet calls as prompt lengths and `max_rows`
    allow; calls of the UNet as it is go through its `graphs`."""
    step = evaluations[0].step
    parts = [
        _Part(
            wish.input,
            wish.timestep,
            text,
            wish.guidance.networks,
            wish.step.controls,
            text is wish.guidance.negative,
        )
        for wish in evaluations
        for text in wish.guidance.texts
    ]
    outputs = (output for call in _calls(parts) for output in _call(step, call, max_rows, graphs))
    return [wish.guidance.guided(list(islice(outputs, len(wish.guidance.texts)))) for wish in evaluations]


def _calls(parts: list[_Part]) -> list[list[_Part]]:
    """The parts in order, cut where prompt lengths have no reasonable common multiple."""
    calls: list[list[_Part]] = []
    num_chunks = 1
    for part in parts:
        num_chunks = math.lcm(num_chunks, part.text.num_chunks)
        if not calls or num_chunks > max(_MAX_CHUNKS, part.text.num_chunks):
            calls.append([])
            num_chunks = part.text.num_chunks
        calls[-1].append(part)
    return calls


def called(
    unet: Any,
    x: torch.Tensor,
    timestep: torch.Tensor,
    text: torch.Tensor,
    added: dict[str, torch.Tensor],
    **controlled: Any,
) -> torch.Tensor:
    """The output of a diffusers UNet for rows of latents, each at its timestep, with its text and, for SDXL, more; and
    with what ControlNets add to it."""
    told = {"encoder_hidden_states": text, "added_cond_kwargs": added, **controlled}
    output: torch.Tensor = unet(x, timestep, return_dict=False, **told)[0]
    return output


def _call(step: Step, parts: list[_Part], max_rows: int, graphs: Graphs | None) -> tuple[torch.Tensor, ...]:
    """The UNet's output in fp32 for each part; the UNet is that of the step, as of all others here."""
    unet = step.unet
    if step.controls or step.tiling:
        graphs = None
    first = parts[0].text
    counts = [len(part.x) for part in parts]
    # Attention over a context that is repeated k times is attention over the context: softmax does not change.
    num_chunks = math.lcm(*{part.text.num_chunks for part in parts})
    texts = [part.text.text.repeat(1, num_chunks // part.text.num_chunks, 1) for part in parts]
    timesteps = [part.timestep for part, count in zip(parts, counts, strict=True) for _ in range(count)]
    x = torch.cat([part.x for part in parts]).to(first.text.dtype)
    timestep = on_device(torch.tensor(timesteps, dtype=torch.float32), x.device)
    text = _rows(texts, counts)
    added = {name: _rows([_added(part, name) for part in parts], counts) for name in first.added or ()}
    residuals = Residuals([(part.controls, part.is_negative) for part in parts], counts, step.tiling)
    outputs = []
    for start in range(0, len(x), max_rows):
        rows = slice(start, start + max_rows)
        inputs = x[rows], timestep[rows], text[rows], {name: tensor[rows] for name, tensor in added.items()}
        changes = list(_changes(parts, counts, rows))
        if graphs is not None and not changes:
            outputs.append(graphs(*inputs))
            continue
        controlled = residuals.of(rows, *inputs)
        with circular(unet, step.tiling), applied(unet, changes):
            outputs.append(called(unet, *inputs, **controlled))
    return torch.split(torch.cat(outputs).float(), counts)


def _changes(parts: list[_Part], counts: list[int], rows: slice) -> Iterator[Change]:
    """What the networks of each part add, for its rows among these of the call."""
    start = 0
    for part, count in zip(parts, counts, strict=True):
        inner = slice(max(start, rows.start) - rows.start, min(start + count, rows.stop) - rows.start)
        if inner.start < inner.stop:
            yield from ((inner, scale, network.unet) for network, scale in part.networks)
        start += count


def _added(part: _Part, name: str) -> torch.Tensor:
    assert part.text.added is not None  # all parts are of one UNet
    return part.text.added[name]


def _rows(tensors: list[torch.Tensor], counts: list[int]) -> torch.Tensor:
    """The first row of each tensor, so many times."""
    return torch.cat([t if n == 1 else t.expand(n, *t.shape[1:]) for t, n in zip(tensors, counts, strict=True)])
