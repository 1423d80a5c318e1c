"""A diffusers scheduler as numbers. What a sampler does in a step is linear in its tensors: the latents, the UNet's
prediction, what it keeps from earlier steps, and noise. So a scheduler runs once on unit vectors in their place, and
what comes out are its coefficients.

A job's steps are then a few multiplications and additions: nothing is looked up or computed on the way, nothing waits
for the GPU, and jobs of the same settings share a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# Which tensors, by their place among a step's sources, with their factors.
Terms = tuple[tuple[int, float], ...]
# Noise between two noise levels, of a process whose parts add up; None: noise of its own.
Interval = tuple[float, float] | None

_MAX_DRAWS = 2  # of noise in a step


@dataclass(frozen=True)
class Step:
    """One evaluation of the UNet and what follows from it. Terms count the sources: the latents, the prediction, what
    was kept, the noise."""

    timestep: float
    input_scale: float  # latents x this is what the UNet reads
    noised: tuple[float, float]  # of clean latents and noise, in latents as they are before this evaluation
    shares: tuple[float, float]  # of what the UNet reads and predicts, in the clean latents that it means
    latents: Terms
    kept: tuple[Terms, ...]
    draws: tuple[Interval, ...]


@dataclass(frozen=True)
class Plan:
    """All of a sampler's steps. `span` are the lowest and the highest noise level above 0."""

    steps: tuple[Step, ...]
    initial_scale: float
    span: tuple[float, float] | None


def read(scheduler: Any, times: Sequence[torch.Tensor], options: dict[str, Any], noise_scale: float = 1.0) -> Plan:
    """Runs a fresh scheduler, its timesteps set, through evaluations at these times, and writes down what it does.
    `options` are those of its step(); the noise that it draws is taken so many times."""
    steps = tuple(_steps(scheduler, times, options, noise_scale))
    span = None
    if any(interval for step in steps for interval in step.draws):
        levels = scheduler.sigmas[scheduler.sigmas > 0]
        span = float(levels.min()), float(levels.max())
    return Plan(steps, float(scheduler.init_noise_sigma), span)


def combined(terms: Terms, sources: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of terms."""
    if not terms:
        return torch.zeros_like(sources[0])
    (first, factor), *rest = terms
    total = sources[first] if factor == 1 else sources[first] * factor
    for source, factor in rest:
        total = torch.add(total, sources[source], alpha=factor)
    return total


def _steps(
    scheduler: Any, times: Sequence[torch.Tensor], options: dict[str, Any], noise_scale: float
) -> Iterator[Step]:
    for time in times:
        places = list(_kept(scheduler))
        units = torch.eye(2 + len(places) + _MAX_DRAWS)[:, None]  # each of shape (1, sources), as latents have rows
        noise = _Noise(noise_scale * units[2 + len(places) :])
        if hasattr(scheduler, "noise_sampler"):
            scheduler.noise_sampler = noise.between
        for index, (holder, key) in enumerate(places):
            holder[key] = units[2 + index]
        noised = scheduler.add_noise(units[0], units[1], time.reshape(1))[0]
        scaled = float(scheduler.scale_model_input(units[0], time)[0, 0])
        with noise:
            after = scheduler.step(units[1], time, units[0], **options)[0]
        yield Step(
            timestep=float(time),
            input_scale=scaled,
            noised=(float(noised[0]), float(noised[1])),
            shares=_shares(scaled * float(noised[0]), scaled * float(noised[1]), scheduler.config.prediction_type),
            latents=_terms(after),
            kept=tuple(_terms(holder[key]) for holder, key in _kept(scheduler)),
            draws=tuple(noise.draws),
        )


def _shares(signal: float, noise: float, prediction_type: str) -> tuple[float, float]:
    """For an input with so much signal and noise (Ho et al. 2020, equation 15; Salimans & Ho 2022, appendix D, for
    v-prediction)."""
    return (signal, -noise) if prediction_type == "v_prediction" else (1 / signal, -noise / signal)


def _kept(scheduler: Any) -> Iterator[tuple[Any, Any]]:
    """Where a scheduler keeps tensors of the latents' shape, as a holder and a key: nothing else in it has rows."""
    attributes = vars(scheduler)
    for name, value in attributes.items():
        entries = enumerate(value) if isinstance(value, list) else ()
        for holder, key, found in ((attributes, name, value), *((value, index, entry) for index, entry in entries)):
            if isinstance(found, torch.Tensor) and found.ndim == 2:
                yield holder, key


def _terms(vector: torch.Tensor) -> Terms:
    return tuple((source, factor) for source, factor in enumerate(vector[0].tolist()) if factor)


class _Noise(TorchFunctionMode):
    """Within it, torch.randn answers unit vectors, and counts them."""

    def __init__(self, units: torch.Tensor) -> None:
        super().__init__()
        self._units = units
        self.draws: list[Interval] = []

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return self._drawn(None) if function is torch.randn else function(*args, **(kwargs or {}))

    def between(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """In place of a scheduler's noise sampler."""
        return self._drawn((float(low), float(high)))

    def _drawn(self, interval: Interval) -> torch.Tensor:
        self.draws.append(interval)
        return self._units[len(self.draws) - 1]
