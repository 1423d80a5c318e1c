"""Owns the formulas that A1111's samplers are: loops as k_diffusion/sampling.py has them, which wait for the model at
each `yield` of (x, sigma) and are given what it takes the clean latents for; and a scheduler by which a diffusers
pipeline goes through one."""

import math
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler
from diffusers.utils.torch_utils import randn_tensor
from scipy import integrate, stats

Loop = Callable[..., Generator[Any, Any, Any]]


@dataclass(frozen=True)
class Kind:
    """A loop, whether it looks twice in a step, has noise of one process, is given a level more than it uses, and by
    which levels it goes where its name ends in none."""

    loop: Loop
    eta: float = 1.0
    order: int = 1
    is_brownian: bool = False
    discards: bool = False
    schedule: str = "Uniform"


def ancestral(before: Any, after: Any, eta: float) -> Any:
    before, after = before.double(), after.double()
    up = min(after, eta * (after**2 * (before**2 - after**2) / before**2) ** 0.5)
    return (after**2 - up**2) ** 0.5, up


def sigma_of(t: Any) -> Any:
    return t.neg().exp()


def t_of(sigma: Any) -> Any:
    return sigma.log().neg()


def euler(x: Any, sigmas: Any, noise: Any, eta: float) -> Any:
    for before, after in pairwise(sigmas):
        x = x + (x - (yield x, before)) / before * (after - before)
    return x


def heun(x: Any, sigmas: Any, noise: Any, eta: float) -> Any:
    for before, after in pairwise(sigmas):
        x = yield from heun_step(x, before, after)
    return x


def euler_ancestral(x: Any, sigmas: Any, noise: Any, eta: float) -> Any:
    for before, after in pairwise(sigmas):
        denoised = yield x, before
        down, up = ancestral(before, after, eta)
        x = x + (x - denoised) / before * (down - before)
        if after > 0:
            x = x + noise() * up
    return x


def lms(x: Any, sigmas: Any, noise: Any, eta: float, order: int = 4) -> Any:
    ds: list[Any] = []
    levels = sigmas.double().numpy()
    for i in range(len(sigmas) - 1):
        ds = [*ds, (x - (yield x, sigmas[i])) / sigmas[i]][-order:]
        coeffs = [linear_multistep_coeff(len(ds), levels, i, j) for j in range(len(ds))]
        x = x + sum(coeff * d for coeff, d in zip(coeffs, reversed(ds), strict=True))
    return x


def linear_multistep_coeff(order: int, t: Any, i: int, j: int) -> float:
    def fn(tau: float) -> float:
        return math.prod((tau - t[i - k]) / (t[i - j] - t[i - k]) for k in range(order) if k != j)

    return float(integrate.quad(fn, t[i], t[i + 1], epsrel=1e-8)[0])


def dpm_2(x: Any, sigmas: Any, noise: Any, eta: float) -> Any:
    for before, after in pairwise(sigmas):
        denoised = yield x, before
        d = (x - denoised) / before
        if after == 0:
            x = x + d * (after - before)
        else:
            middle = before.log().lerp(after.log(), 0.5).exp()
            x_2 = x + d * (middle - before)
            x = x + (x_2 - (yield x_2, middle)) / middle * (after - before)
    return x


def dpm_2_ancestral(x: Any, sigmas: Any, noise: Any, eta: float) -> Any:
    for before, after in pairwise(sigmas):
        denoised = yield x, before
        down, up = ancestral(before, after, eta)
        d = (x - denoised) / before
        if down == 0:
            x = x + d * (down - before)
        else:
            middle = before.double().log().lerp(down.log(), 0.5).exp()
            x_2 = x + d * (middle - before)
            x = x + (x_2 - (yield x_2, middle)) / middle * (down - before)
            x = x + noise() * up
    return x


def dpmpp_2s_ancestral(x: Any, sigmas: Any, noise: Any, eta: float) -> Any:
    for before, after in pairwise(sigmas):
        denoised = yield x, before
        down, up = ancestral(before, after, eta)
        if down == 0:
            x = x + (x - denoised) / before * (down - before)
        else:
            t, t_next = t_of(before), t_of(down)
            h = t_next - t
            s = t + h / 2
            x_2 = (sigma_of(s) / sigma_of(t)) * x - (-h / 2).expm1() * denoised
            denoised_2 = yield x_2, sigma_of(s)
            x = (sigma_of(t_next) / sigma_of(t)) * x - (-h).expm1() * denoised_2
        if after > 0:
            x = x + noise() * up
    return x


def dpmpp_sde(x: Any, sigmas: Any, noise: Any, eta: float) -> Any:
    for before, after in pairwise(sigmas):
        denoised = yield x, before
        if after == 0:
            x = x + (x - denoised) / before * (after - before)
            continue
        t, t_next = t_of(before), t_of(after)
        s = t + (t_next - t) / 2
        down, up = ancestral(sigma_of(t), sigma_of(s), eta)
        s_ = t_of(down)
        x_2 = (sigma_of(s_) / sigma_of(t)) * x - (t - s_).expm1() * denoised
        x_2 = x_2 + noise(sigma_of(t), sigma_of(s)) * up
        denoised_2 = yield x_2, sigma_of(s)
        down, up = ancestral(sigma_of(t), sigma_of(t_next), eta)
        t_next_ = t_of(down)
        x = (sigma_of(t_next_) / sigma_of(t)) * x - (t - t_next_).expm1() * denoised_2
        x = x + noise(sigma_of(t), sigma_of(t_next)) * up
    return x


def dpmpp_2m(x: Any, sigmas: Any, noise: Any, eta: float) -> Any:
    old_denoised = None
    for i in range(len(sigmas) - 1):
        denoised = yield x, sigmas[i]
        t, t_next = t_of(sigmas[i]), t_of(sigmas[i + 1])
        h = t_next - t
        if old_denoised is None or sigmas[i + 1] == 0:
            x = (sigma_of(t_next) / sigma_of(t)) * x - (-h).expm1() * denoised
        else:
            r = (t - t_of(sigmas[i - 1])) / h
            denoised_d = (1 + 1 / (2 * r)) * denoised - (1 / (2 * r)) * old_denoised
            x = (sigma_of(t_next) / sigma_of(t)) * x - (-h).expm1() * denoised_d
        old_denoised = denoised
    return x


def dpmpp_2m_sde(x: Any, sigmas: Any, noise: Any, eta: float, solver_type: str = "midpoint") -> Any:
    old_denoised, h_last, h = None, None, None
    for before, after in pairwise(sigmas):
        denoised = yield x, before
        if after == 0:
            x = denoised
        else:
            t, s = -before.log(), -after.log()
            h = s - t
            eta_h = eta * h
            x = after / before * (-eta_h).exp() * x + (-h - eta_h).expm1().neg() * denoised
            if old_denoised is not None:
                assert h_last is not None
                r = h_last / h
                if solver_type == "heun":
                    factor = (-h - eta_h).expm1().neg() / (-h - eta_h) + 1
                else:
                    factor = 0.5 * (-h - eta_h).expm1().neg()
                x = x + factor * (1 / r) * (denoised - old_denoised)
            if eta:
                x = x + noise(before, after) * after * (-2 * eta_h).expm1().neg().sqrt()
        old_denoised, h_last = denoised, h
    return x


def dpmpp_3m_sde(x: Any, sigmas: Any, noise: Any, eta: float) -> Any:
    denoised_1, denoised_2, h, h_1, h_2 = None, None, None, None, None
    for before, after in pairwise(sigmas):
        denoised = yield x, before
        if after == 0:
            x = denoised
        else:
            h = before.log() - after.log()
            h_eta = h * (eta + 1)
            x = (-h_eta).exp() * x + (-h_eta).expm1().neg() * denoised
            phi_2 = h_eta.neg().expm1() / h_eta + 1
            if h_2 is not None:
                r0, r1 = h_1 / h, h_2 / h
                d1_0, d1_1 = (denoised - denoised_1) / r0, (denoised_1 - denoised_2) / r1
                d1 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1)
                d2 = (d1_0 - d1_1) / (r0 + r1)
                x = x + phi_2 * d1 - (phi_2 / h_eta - 0.5) * d2
            elif h_1 is not None:
                x = x + phi_2 * (denoised - denoised_1) / (h_1 / h)
            if eta:
                x = x + noise(before, after) * after * (-2 * h * eta).expm1().neg().sqrt()
        denoised_1, denoised_2 = denoised, denoised_1
        h_1, h_2 = h, h_1
    return x


def dpm_fast(x: Any, sigmas: Any, noise: Any, eta: float) -> Any:
    """DPMSolver.dpm_solver_fast, from the first of the levels to the last but one in as many looks as there are."""
    nfe = len(sigmas) - 1
    m = math.floor(nfe / 3) + 1
    ts = torch.linspace(float(t_of(sigmas[0])), float(t_of(sigmas[-2])), m + 1, dtype=torch.float64)
    orders = [3] * (m - 2) + [2, 1] if nfe % 3 == 0 else [3] * (m - 1) + [nfe % 3]
    for i, order in enumerate(orders):
        t, t_next = ts[i], ts[i + 1]
        t_next_, su = t_next, 0.0
        if eta:
            t_next_ = torch.minimum(ts[-1], t_of(ancestral(sigma_of(t), sigma_of(t_next), eta)[0]))
            su = (sigma_of(t_next) ** 2 - sigma_of(t_next_) ** 2).clamp(min=0) ** 0.5
        h = t_next_ - t
        eps = (x - (yield x, sigma_of(t))) / sigma_of(t)
        if order == 1:
            x = x - sigma_of(t_next_) * h.expm1() * eps
        elif order == 2:
            s1 = t + h / 2
            u1 = x - sigma_of(s1) * (h / 2).expm1() * eps
            eps_r1 = (u1 - (yield u1, sigma_of(s1))) / sigma_of(s1)
            x = x - sigma_of(t_next_) * h.expm1() * eps - sigma_of(t_next_) * h.expm1() * (eps_r1 - eps)
        else:
            r1, r2 = 1 / 3, 2 / 3
            s1, s2 = t + r1 * h, t + r2 * h
            u1 = x - sigma_of(s1) * (r1 * h).expm1() * eps
            eps_r1 = (u1 - (yield u1, sigma_of(s1))) / sigma_of(s1)
            bend = sigma_of(s2) * (r2 / r1) * ((r2 * h).expm1() / (r2 * h) - 1)
            u2 = x - sigma_of(s2) * (r2 * h).expm1() * eps - bend * (eps_r1 - eps)
            eps_r2 = (u2 - (yield u2, sigma_of(s2))) / sigma_of(s2)
            bend = sigma_of(t_next_) / r2 * (h.expm1() / h - 1)
            x = x - sigma_of(t_next_) * h.expm1() * eps - bend * (eps_r2 - eps)
        if su:
            x = x + su * noise()
    return x


def restart(x: Any, sigmas: Any, noise: Any, eta: float) -> Any:
    """restart_sampler of A1111's modules/sd_samplers_extra.py."""
    steps = len(sigmas) - 1
    row, returns, again = sigmas, 0, torch.zeros(0)
    if steps >= 20:
        returns, length = (1, 9) if steps < 36 else (2, steps // 4)
        row = get_sigmas_karras(steps - returns * length, float(sigmas[-2]), float(sigmas[0]))
        low, high = ((row - sigma).abs().argmin() for sigma in (0.1, 2))
        again = get_sigmas_karras(length + 1, float(row[low]), float(row[high]))[:-1]
    last = None
    for before, after in pairwise(row):
        x = yield from heun_step(x, before, after)
        if returns and after == row[low]:
            last = after
            for _ in range(returns):
                x = x + noise() * (again[0] ** 2 - last**2) ** 0.5
                for higher, lower in pairwise(again):
                    x = yield from heun_step(x, higher, lower)
                last = again[-1]
    return x


def heun_step(x: Any, before: Any, after: Any) -> Any:
    d = (x - (yield x, before)) / before
    x_2 = x + d * (after - before)
    if after == 0:
        return x_2
    d_2 = (x_2 - (yield x_2, after)) / after
    return x + (d + d_2) / 2 * (after - before)


def get_sigmas_karras(n: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Any:
    ramp = torch.linspace(0, 1, n)
    lowest, highest = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat([(highest + ramp * (lowest - highest)) ** rho, torch.zeros(1)])


# A1111's modules/sd_samplers_kdiffusion.py has which of them get a level more.
KINDS = {
    "Euler": Kind(euler),
    "Heun": Kind(heun, order=2),
    "Euler a": Kind(euler_ancestral),
    "LMS": Kind(lms),
    "DPM2": Kind(dpm_2, order=2, discards=True),
    "DPM2 a": Kind(dpm_2_ancestral, order=2, discards=True),
    "DPM++ 2S a": Kind(dpmpp_2s_ancestral, order=2),
    "DPM++ 2M": Kind(dpmpp_2m),
    "DPM++ SDE": Kind(dpmpp_sde, order=2, is_brownian=True),
    "DPM++ 2M SDE": Kind(dpmpp_2m_sde, is_brownian=True),
    "DPM++ 2M SDE Heun": Kind(partial(dpmpp_2m_sde, solver_type="heun"), is_brownian=True),
    "DPM++ 3M SDE": Kind(dpmpp_3m_sde, is_brownian=True, discards=True),
    "DPM fast": Kind(dpm_fast),
    "Restart": Kind(restart, order=2, schedule="Karras"),
}


def t_to_sigma(t: Any, table: Any) -> Any:
    low, high, w = t.floor().long(), t.ceil().long(), t.frac()
    return ((1 - w) * table.log()[low] + w * table.log()[high]).exp()


def get_sigmas_exponential(n: int, table: Any) -> Any:
    return torch.linspace(math.log(table[-1].item()), math.log(table[0].item()), n).exp()


def beta_scheduler(n: int, table: Any) -> Any:
    low, high = table[0].item(), table[-1].item()
    return torch.FloatTensor([low + stats.beta.ppf(x, 0.6, 0.6) * (high - low) for x in 1 - np.linspace(0, 1, n)])


# From k_diffusion/sampling.py and A1111's modules/sd_schedulers.py, without the last level, which is 0.
SCHEDULES: dict[str, Callable[[int, Any], Any]] = {
    "SGM Uniform": lambda n, table: t_to_sigma(torch.linspace(999, 0, n + 1)[:-1], table),
    "Uniform": lambda n, table: t_to_sigma(torch.linspace(999, 0, n), table),
    "Simple": lambda n, table: torch.FloatTensor([table[-(1 + int(x * 1000 / n))].item() for x in range(n)]),
    "Karras": lambda n, table: get_sigmas_karras(n, table[0].item(), table[-1].item())[:-1],
    "Exponential": get_sigmas_exponential,
    "Beta": beta_scheduler,
}


class Scheduler(diffusers.EulerDiscreteScheduler):  # type: ignore[misc]
    """A loop over a schedule's levels, for models that predict noise. The levels at which it looks are known
    after it has gone through once with nothing. Latents are kept in double precision between the looks."""

    kind: Kind
    schedule: str
    s_noise = 1.0
    eta: float
    seeds: Any

    @property
    def order(self) -> int:
        return self.kind.order

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        # Of ldm's double precision.
        betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
        self.alphas_cumprod = torch.tensor(np.cumprod(1.0 - betas), dtype=torch.float32)
        table = ((1 - self.alphas_cumprod) / self.alphas_cumprod) ** 0.5
        levels = SCHEDULES[self.schedule](num_inference_steps + self.kind.discards, table)
        super().set_timesteps(device=device, sigmas=[*levels.tolist(), 0.0])
        self._times = dict(zip(self.sigmas.tolist(), self.timesteps.tolist(), strict=False))
        self._levels = torch.cat([self.sigmas[:-2], self.sigmas[-1:]]) if self.kind.discards else self.sigmas.clone()
        self._looks(0)

    def set_begin_index(self, begin_index: int = 0) -> None:
        super().set_begin_index(begin_index)
        self._looks(begin_index)

    def _looks(self, begin: int) -> None:
        self._solver: Any = None
        self._used = self._levels[begin // self.order :]
        looks = []
        solver = self.kind.loop(torch.zeros(1), self._used, lambda *_: torch.zeros(1), self.eta)
        with suppress(StopIteration):
            x_and_sigma = next(solver)
            while True:
                looks.append(float(x_and_sigma[1]))
                x_and_sigma = solver.send(torch.zeros(1))
        log_sigmas = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt().log().numpy()
        times = [float(self._sigma_to_t(torch.tensor(sigma).numpy(), log_sigmas)) for sigma in looks]
        # Levels have the times that they were made from.
        times[:: self.order] = [self._times.get(sigma, time) for sigma, time in zip(looks, times, strict=True)][
            :: self.order
        ]
        # Those before where it begins are of no use, but count. Pipelines look at the times before they say where.
        self.sigmas = torch.tensor([float(self._levels[0])] * begin + looks + [0.0])
        if begin:
            self.timesteps[begin:] = torch.tensor(times)
        else:
            self.timesteps = torch.tensor(times)

    def step(
        self, model_output: Any, timestep: Any, sample: Any, generator: Any = None, return_dict: bool = True
    ) -> Any:
        self._generator = generator
        if self._solver is None:
            positive = self._levels[self._levels > 0]
            # The levels of the process are those of the whole schedule.
            self._process = BrownianTreeNoiseSampler(sample.cpu(), positive.min(), positive.max(), seed=self.seeds)
            self._solver = self.kind.loop(sample.double(), self._used, partial(self._noise, sample), self.eta)
            self._x, _ = next(self._solver)
        denoised = self._x - self.sigmas[self.step_index].double() * model_output
        self._step_index += 1
        try:
            self._x, _ = self._solver.send(denoised)
        except StopIteration as end:
            self._solver = self._generator = None  # it may be copied now
            self._x = end.value
        return (self._x.float(),)

    def _noise(self, like: torch.Tensor, *interval: Any) -> torch.Tensor:
        if self.kind.is_brownian:
            found: torch.Tensor = self._process(*interval)
            return self.s_noise * found.to(like.device)
        drawn: torch.Tensor = randn_tensor(like.shape, self._generator, like.device, like.dtype)
        return self.s_noise * drawn
