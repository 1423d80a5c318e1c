"""k-diffusion's samplers, which most of A1111's are, as diffusers schedulers. `eta` is the share of the noise that a
step takes away and puts back anew.

The formulas are those of k_diffusion/sampling.py, in terms of what the model takes the clean latents for. How latents
have a noise level, and a model its timestep, with fractions, is diffusers' Euler's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import exp, expm1, log, sqrt
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from numpy.polynomial.polynomial import polyfromroots, polyint, polyval

from gpu_worker.sampling.schedules import Schedule, karras_between

# From so many steps on Restart goes back to more noise, and from so many on twice: from the level nearest to the low
# one, which it has reached, to the one nearest to the high one.
_RESTARTS_FROM, _TWICE_FROM = 20, 36
_RESTART_LOW, _RESTART_HIGH = 0.1, 2.0
_LMS_ORDER = 4
# Where DPM-Solver looks at the noise within a step of each order, in parts of the step.
_FRACTIONS = {1: (0.0,), 2: (0.0, 1 / 2), 3: (0.0, 1 / 3, 2 / 3)}


class KDiffusion(EulerDiscreteScheduler):
    """What they share. `eta` and the schedule are set before the timesteps."""

    eta: float
    schedule: Schedule
    # Whether A1111 tells it `s_noise`, by which its noise is multiplied (modules/sd_samplers_kdiffusion.py).
    heeds_s_noise = True
    # A1111 makes one level more for these, and leaves out the lowest.
    leaves_out_lowest = False

    def set_timesteps(self, num_inference_steps: Any = None, *options: Any, **named: Any) -> None:
        """As diffusers'."""
        config: Any = self.config
        ends = config.beta_start**0.5, config.beta_end**0.5
        roots = torch.linspace(*ends, config.num_train_timesteps, dtype=torch.float64)
        self.alphas_cumprod = (1 - roots**2).cumprod(0).float()  # as A1111 has them: diffusers loses bits on the way
        self._table = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()
        levels = self.schedule(num_inference_steps + self.leaves_out_lowest, self._table)[:num_inference_steps]
        named["sigmas"] = [*levels.tolist(), 0.0]
        super().set_timesteps(*options, **named)

    def step(self, model_output: Any, timestep: Any, sample: Any, *_: Any, **__: Any) -> Any:
        """The latents after an evaluation, in a tuple."""
        clean = super().step(model_output, timestep, sample, return_dict=False)[1]
        return (self._after(sample, clean, int(self.step_index or 0) - 1),)

    @abstractmethod
    def _after(self, x: Any, clean: Any, index: int) -> Any:
        """The latents after the evaluation of that index, in which they were x."""

    def _times(self, sigmas: torch.Tensor) -> torch.Tensor:
        """The timesteps of noise levels."""
        logarithms = self._table.log().numpy()
        return torch.tensor([float(self._sigma_to_t(np.array(float(sigma)), logarithms)) for sigma in sigmas])


class Euler(KDiffusion):
    """`sample_euler`."""

    def _after(self, x: Any, clean: Any, index: int) -> Any:
        return clean.lerp(x, self.sigmas[index + 1] / self.sigmas[index])


class EulerAncestral(KDiffusion):
    """`sample_euler_ancestral`."""

    heeds_s_noise = False

    def _after(self, x: Any, clean: Any, index: int) -> Any:
        before, after = self.sigmas[index : index + 2]
        down, up = _ancestral(before, after, self.eta)
        return clean.lerp(x, down / before) + torch.randn(x.shape) * up


class LMS(KDiffusion):
    """`sample_lms`: Adams-Bashforth's method over uneven levels, as far back as it has looked, up to four levels."""

    def set_timesteps(self, num_inference_steps: Any = None, *options: Any, **named: Any) -> None:
        """As diffusers'."""
        super().set_timesteps(num_inference_steps, *options, **named)
        self._slopes: list[Any] = []  # latest first

    def _after(self, x: Any, clean: Any, index: int) -> Any:
        levels = self.sigmas[: index + 2].double().numpy()[::-1]
        self._slopes = [(x - clean) / float(levels[1]), *self._slopes[: _LMS_ORDER - 1]]
        weights = _multistep_weights(levels[1 : 1 + len(self._slopes)], levels[0])
        return x + sum(weight * slope for weight, slope in zip(weights, self._slopes, strict=True))


class _TwoLooks(KDiffusion):
    """Looks a second time in each step, at a level in its middle, but in the last one, which goes to no noise."""

    order = 2
    _begun: Any  # the latents that the step began with

    def set_timesteps(self, num_inference_steps: Any = None, *options: Any, **named: Any) -> None:
        """As diffusers', each level but the last with that in the middle behind it."""
        super().set_timesteps(num_inference_steps, *options, **named)
        levels = self.sigmas[:-1]
        middles = self._middle(levels[:-1], levels[1:])
        self.sigmas = torch.cat([_alternating(levels, middles), self.sigmas[-1:]])
        self.timesteps = _alternating(self.timesteps, self._times(middles).to(self.timesteps))

    def _after(self, x: Any, clean: Any, index: int) -> Any:
        if index == len(self.sigmas) - 2:
            return clean
        before, middle, after = self.sigmas[index - index % 2 :][:3]
        if index % 2:
            return self._second(self._begun, x, clean, before, middle, after)
        self._begun = x
        return self._first(x, clean, before, middle)

    def _middle(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """The level half way, in log-SNR, to where a step without its new noise ends."""
        return (before * _ancestral(before, after, self.eta)[0]).sqrt()

    def _first(self, x: Any, clean: Any, before: Any, middle: Any) -> Any:
        """The latents to look at in the middle."""
        return clean.lerp(x, middle / before)

    @abstractmethod
    def _second(self, begun: Any, x: Any, clean: Any, before: Any, middle: Any, after: Any) -> Any:
        """The latents after the step, which began with others."""


class DPM2Ancestral(_TwoLooks):
    """`sample_dpm_2_ancestral`, which is `sample_dpm_2` where eta is 0."""

    leaves_out_lowest = True

    def _second(self, begun: Any, x: Any, clean: Any, before: Any, middle: Any, after: Any) -> Any:
        down, up = _ancestral(before, after, self.eta)
        return begun + (x - clean) * ((down - before) / middle) + torch.randn(x.shape) * up


class DPM2SAncestral(_TwoLooks):
    """`sample_dpmpp_2s_ancestral`."""

    def _second(self, begun: Any, x: Any, clean: Any, before: Any, middle: Any, after: Any) -> Any:
        down, up = _ancestral(before, after, self.eta)
        return clean.lerp(begun, down / before) + torch.randn(x.shape) * up


class DPMSde(_TwoLooks):
    """`sample_dpmpp_sde`: new noise comes in the middle too, all of it from one process in time.

    Such a process is rough: what a rounding moves by 1e-7 is another noise by 3e-4. So the levels go through logarithms
    as they do there.
    """

    noise_sampler: Any = None

    def set_timesteps(self, num_inference_steps: Any = None, *options: Any, **named: Any) -> None:
        """As diffusers'."""
        super().set_timesteps(num_inference_steps, *options, **named)
        self.sigmas[::2] = self.sigmas[::2].log().exp()

    def _middle(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        begin, end = before.log(), after.log()
        return (begin + (end - begin) / 2).exp()

    def _first(self, x: Any, clean: Any, before: Any, middle: Any) -> Any:
        down, up = _ancestral(before, middle, self.eta)
        return clean.lerp(x, down / before) + self.noise_sampler(before, middle) * up

    def _second(self, begun: Any, x: Any, clean: Any, before: Any, middle: Any, after: Any) -> Any:
        down, up = _ancestral(before, after, self.eta)
        return clean.lerp(begun, down / before) + self.noise_sampler(before, after) * up


class _Multistep(KDiffusion):
    """Looks back at the clean latents of the steps before, in terms of h, the steps' lengths in log-SNR."""

    noise_sampler: Any = None

    def set_timesteps(self, num_inference_steps: Any = None, *options: Any, **named: Any) -> None:
        """As diffusers'."""
        super().set_timesteps(num_inference_steps, *options, **named)
        self._before: list[Any] = []  # what was taken for the clean latents, latest first

    def _after(self, x: Any, clean: Any, index: int) -> Any:
        before, after = (float(sigma) for sigma in self.sigmas[index : index + 2])
        known, self._before = self._before, [clean, *self._before[:1]]
        if after == 0:
            return clean
        h = log(before / after)
        ratios = [self._length(index - back) / h for back in range(1, len(known) + 1)]
        whole = h * (1 + self.eta)
        result = clean.lerp(x, exp(-whole)) + self._correction(whole, clean, known, ratios)
        if self.eta:
            result = result + self.noise_sampler(before, after) * (after * sqrt(-expm1(-2 * self.eta * h)))
        return result

    def _length(self, index: int) -> float:
        return log(float(self.sigmas[index] / self.sigmas[index + 1]))

    @abstractmethod
    def _correction(self, whole: float, clean: Any, known: list[Any], ratios: list[float]) -> Any:
        """By what was known in the steps before, whose lengths are these parts of this one's. `whole` is h with what
        new noise takes away."""


class DPM2M(_Multistep):
    """`sample_dpmpp_2m_sde` with the solver `midpoint`, which is `sample_dpmpp_2m` where eta is 0."""

    def _correction(self, whole: float, clean: Any, known: list[Any], ratios: list[float]) -> Any:
        return (clean - known[0]) * (self._factor(whole) / ratios[0]) if known else 0.0

    def _factor(self, whole: float) -> float:
        return -expm1(-whole) / 2


class DPM2MHeun(DPM2M):
    """`sample_dpmpp_2m_sde` with the solver `heun`."""

    def _factor(self, whole: float) -> float:
        return expm1(-whole) / whole + 1


class DPM3M(DPM2MHeun):
    """`sample_dpmpp_3m_sde`."""

    leaves_out_lowest = True

    def _correction(self, whole: float, clean: Any, known: list[Any], ratios: list[float]) -> Any:
        if len(known) < 2:
            return super()._correction(whole, clean, known, ratios)
        phi_2 = self._factor(whole)
        phi_3 = phi_2 / whole - 1 / 2
        near, far = (clean - known[0]) / ratios[0], (known[0] - known[1]) / ratios[1]
        bend = (near - far) / sum(ratios)
        return (near + bend * ratios[0]) * phi_2 - bend * phi_3


@dataclass(frozen=True)
class _Look:
    """An evaluation at a noise level, and what follows: the latents that the step began with, less these parts of the
    noise seen then and of how far this one differs from it; at the step's end new noise."""

    sigma: float
    is_first: bool
    of_noise: float
    of_difference: float
    up: float = 0.0


class DPMFast(KDiffusion):
    """`sample_dpm_fast`: DPM-Solver-fast (Lu et al. 2022, algorithm 3.3), which has as many looks as there are steps,
    three to a stretch of evenly spaced log-SNR and less to the last ones. What begins later begins such a row of its
    own. It ends at the lowest noise level of the model, as A1111's does."""

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Has the looks begin at a level of the uniform schedule; to be called after set_timesteps."""
        super().set_begin_index(begin_index)
        lowest = float(self._table[0])
        levels = self.sigmas[begin_index:-1]
        self._looks = list(_looks(float(levels[0]), lowest, len(levels), self.eta))
        sigmas = torch.tensor([look.sigma for look in self._looks])
        self.sigmas[begin_index:-1] = sigmas
        self.timesteps[begin_index:] = self._times(sigmas)

    def _after(self, x: Any, clean: Any, index: int) -> Any:
        look = self._looks[index - int(self.begin_index or 0)]
        noise = (x - clean) / look.sigma
        if look.is_first:
            self._begun, self._noise = x, noise
        after = self._begun - look.of_noise * self._noise - look.of_difference * (noise - self._noise)
        return after + look.up * torch.randn(x.shape) if look.up else after


def _looks(highest: float, lowest: float, num_looks: int, eta: float) -> Iterator[_Look]:
    """In terms of t, the negative logarithm of the noise level; h is the length of a step."""
    num_steps = num_looks // 3 + 1
    orders = [3] * (num_steps - 1) + [num_looks % 3] if num_looks % 3 else [3] * (num_steps - 2) + [2, 1]
    times = np.linspace(-log(highest), -log(lowest), num_steps + 1)
    for order, t, t_after in zip(orders, times[:-1], times[1:], strict=True):
        before, after = torch.tensor([exp(-t), exp(-t_after)], dtype=torch.float64)
        down = float(_ancestral(before, after, eta)[0])
        t_next = min(times[-1], -log(down)) if down > 0 else times[-1]
        h = t_next - t
        for look, fraction in enumerate(_FRACTIONS[order]):
            is_last = look + 1 == order
            to = h if is_last else _FRACTIONS[order][look + 1] * h
            sigma = exp(-(t + to))
            by = expm1(to) / 2 if order < max(_FRACTIONS) else expm1(to) / to - 1
            yield _Look(
                sigma=exp(-(t + fraction * h)),
                is_first=not look,
                of_noise=sigma * expm1(to),
                of_difference=sigma * by * to / (fraction * h) if look else 0.0,
                up=sqrt(max(0.0, exp(-t_after) ** 2 - exp(-t_next) ** 2)) if is_last and eta else 0.0,
            )


class Heun(KDiffusion):
    """`sample_heun`: looks at both ends of each step but the last, which goes to no noise."""

    order = 2

    def set_timesteps(self, num_inference_steps: Any = None, *options: Any, **named: Any) -> None:
        """As diffusers'."""
        super().set_timesteps(num_inference_steps, *options, **named)
        self._levels = self.sigmas
        self._go(list(pairwise(self._levels.tolist())))

    def _go(self, steps: list[tuple[float, float]], begin_index: int = 0) -> None:
        """By these steps, each from one level to another, from that look on."""
        self.sigmas = torch.cat([self._levels[:1].expand(begin_index), torch.tensor(steps).flatten()])
        self.timesteps = self._times(self.sigmas[:-1])

    def _after(self, x: Any, clean: Any, index: int) -> Any:
        if index == len(self.sigmas) - 2:
            return clean
        before, after = self.sigmas[index - index % 2 :][:2]
        slope = (x - clean) / self.sigmas[index]
        if not index % 2:
            self._begun, self._slope = x, slope
            return x + slope * (after - before)
        return self._begun + (self._slope + slope) * ((after - before) / 2)


class Restart(Heun):
    """A1111's `restart_sampler` (Xu et al. 2023): Heun's method down Karras' levels, with returns to more noise on the
    way. What begins later begins such a row of its own."""

    heeds_s_noise = False

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Has the looks begin with a step of the row; to be called after set_timesteps."""
        super().set_begin_index(begin_index)
        self._go(_with_restarts(self._levels[begin_index // self.order :]), begin_index)

    def _after(self, x: Any, clean: Any, index: int) -> Any:
        result = super()._after(x, clean, index)
        level, following = self.sigmas[index : index + 2]
        # Of two looks in a row at different steps the second may be at more noise.
        return result + torch.randn(x.shape) * (following**2 - level**2).sqrt() if following > level else result


def _with_restarts(levels: torch.Tensor) -> list[tuple[float, float]]:
    """As many steps as lead down these levels, of which the last is 0: each from one level to another."""
    num_steps = len(levels) - 1
    if num_steps < _RESTARTS_FROM:
        return list(pairwise(levels.tolist()))
    num_restarts, length = (2, num_steps // 4) if num_steps >= _TWICE_FROM else (1, 9)
    row = karras_between(float(levels[0]), float(levels[-2]), num_steps - num_restarts * length)
    low, high = (int((row - level).abs().argmin()) for level in (_RESTART_LOW, _RESTART_HIGH))
    steps = list(pairwise([*row.tolist(), 0.0]))
    if high < low:
        again = karras_between(float(row[high]), float(row[low]), length + 1).tolist()
        steps[low:low] = num_restarts * list(pairwise(again))
    return steps


def _multistep_weights(levels: Any, after: float) -> Iterator[float]:
    """Of the slopes at these levels, latest first, in the step from the first of them to another: the integral of the
    polynomial that is 1 at one of them and 0 at the others."""
    for index, level in enumerate(levels):
        others = np.delete(levels, index)
        integral = polyint(polyfromroots(others), lbnd=levels[0])
        yield float(polyval(after, integral) / np.prod(level - others))


def _ancestral(before: Any, after: Any, eta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`get_ancestral_step`: down to which noise level a step goes, and how much noise it adds, from one level to the
    next. In double precision, as little may be left of the difference of squares."""
    before, after = before.double(), after.double()
    up = torch.minimum(after, eta * (after**2 * (before**2 - after**2) / before**2).sqrt())
    return (after**2 - up**2).sqrt(), up


def _alternating(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Those of both in turn; of the second there is one less."""
    pairs = torch.stack([first[:-1], second], 1).flatten()
    return torch.cat([pairs, first[-1:]])
