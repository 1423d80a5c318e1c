"""A1111's samplers as diffusers schedulers, by the names in the payloads' samplers.py; a test keeps the two equal."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler
from diffusers.schedulers.scheduling_lcm import LCMScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

from gpu_worker.devices import on_device
from gpu_worker.sampling import plans
from gpu_worker.sampling.kdiffusion import (
    DPM2M,
    DPM3M,
    LMS,
    DPM2Ancestral,
    DPM2MHeun,
    DPM2SAncestral,
    DPMFast,
    DPMSde,
    Euler,
    EulerAncestral,
    Heun,
    KDiffusion,
    Restart,
)
from gpu_worker.sampling.noise import Generator, normal
from gpu_worker.sampling.plans import Interval, Plan, combined
from gpu_worker.sampling.schedules import SCHEDULES
from services.common.payloads.samplers import parts, sampler_of

SAMPLERS: dict[str, type[Any]] = {
    "Euler": Euler,
    "Euler a": EulerAncestral,
    "LMS": LMS,
    "Heun": Heun,
    "DPM2": DPM2Ancestral,
    "DPM2 a": DPM2Ancestral,
    "DPM++ 2S a": DPM2SAncestral,
    "DPM++ 2M": DPM2M,
    "DPM++ SDE": DPMSde,
    "DPM++ 2M SDE": DPM2M,
    "DPM++ 2M SDE Heun": DPM2MHeun,
    "DPM++ 3M SDE": DPM3M,
    "DPM fast": DPMFast,
    "Restart": Restart,
    "DDIM": DDIMScheduler,
    "PLMS": PNDMScheduler,
    "UniPC": UniPCMultistepScheduler,
    "LCM": LCMScheduler,
}
_LEADING = {"timestep_spacing": "leading"}
_OPTIONS: dict[str, dict[str, Any]] = {
    "DDIM": _LEADING | {"clip_sample": False, "set_alpha_to_one": False},
    "PLMS": _LEADING | {"skip_prk_steps": True, "set_alpha_to_one": False},
    # bh1 of order 3 gives NaN at the final noise level 0.
    "UniPC": _LEADING | {"solver_order": 3, "solver_type": "bh2"},
    "LCM": _LEADING | {"clip_sample": False},
}
_MODEL_OPTIONS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "steps_offset", "prediction_type")
_LCM_STEPS = 50  # of the teacher
_MAX_PLANS = 256  # of settings that were used last


class Sampling:
    """A sampler at work on the images of one batch of one job: all its state, the noise of each row included.

    Noise is drawn on the CPU in fp32, by the generators of the rows, so that no device draws another picture.
    """

    def __init__(self, plan: Plan, num_steps: int, generators: Sequence[Generator]) -> None:
        self._plan = plan
        self._generators = generators
        self._seeds = [generator.initial_seed() for generator in generators]
        self._kept: list[torch.Tensor] = []
        self._process: Any = None
        self.num_steps = num_steps
        # One for each evaluation of the UNet, of which some samplers have two in a step.
        self.timesteps = [step.timestep for step in plan.steps]

    def step_of(self, index: int) -> int:
        """The step that the evaluation of that index belongs to, from 0."""
        return index * self.num_steps // len(self.timesteps)

    def latents(self, noise: torch.Tensor) -> torch.Tensor:
        """The latents to begin with, from noise of deviation 1."""
        return noise * self._plan.initial_scale

    def noised(self, clean: torch.Tensor, noise: torch.Tensor, index: int) -> torch.Tensor:
        """Clean latents as they are before the evaluation of that index."""
        of_clean, of_noise = self._plan.steps[index].noised
        return torch.add(clean * of_clean, noise, alpha=of_noise)

    def noise_level(self, index: int) -> float:
        """How much noise there is for one of signal before the evaluation of that index: k-diffusion's sigma."""
        of_clean, of_noise = self._plan.steps[index].noised
        return of_noise / of_clean

    def shares(self, index: int) -> tuple[float, float]:
        """Of the UNet's input and its prediction, in the clean latents that this means, at the evaluation of that
        index."""
        return self._plan.steps[index].shares

    def scaled(self, latents: torch.Tensor, index: int) -> torch.Tensor:
        """The UNet's input for the evaluation of that index."""
        scale = self._plan.steps[index].input_scale
        return latents if scale == 1 else latents * scale

    def step(self, prediction: torch.Tensor, index: int, latents: torch.Tensor) -> torch.Tensor:
        """The latents after the evaluation of that index."""
        step = self._plan.steps[index]
        noise = [on_device(self._drawn(interval, latents), latents.device) for interval in step.draws]
        sources = [latents, prediction, *self._kept, *noise]
        self._kept = [combined(terms, sources) for terms in step.kept]
        return combined(step.latents, sources)

    def _drawn(self, interval: Interval, latents: torch.Tensor) -> torch.Tensor:
        """Noise of the latents' shape, on the CPU."""
        row = (1, *latents.shape[1:])
        if interval is None:
            return torch.cat([normal(row, generator) for generator in self._generators])
        if self._process is None:
            assert self._plan.span is not None
            like = torch.empty(latents.shape)
            # One Brownian tree for each row; diffusers' own batch draws all rows from one.
            self._process = BrownianTreeNoiseSampler(like, *self._plan.span, seed=self._seeds)
        drawn: torch.Tensor = self._process(*interval)
        return drawn


def create(
    name: str,
    model_config: dict[str, Any],
    num_steps: int,
    generators: Sequence[Generator],
    eta: float | None = None,
    first_step: int = 0,
    s_noise: float = 1.0,
) -> Sampling:
    """A fresh sampler, by its name in a checked payload, for rows with these generators of noise. `eta` counts for
    those that have one, `s_noise` for those that heed it; of the steps, those before `first_step` are left out."""
    own_eta = sampler_of(name).eta
    eta = own_eta if own_eta is None or eta is None else eta
    options = tuple((key, model_config[key]) for key in _MODEL_OPTIONS if key in model_config)
    return Sampling(_plan(name, options, num_steps, eta, first_step, s_noise), num_steps - first_step, generators)


@lru_cache(_MAX_PLANS)
def _plan(
    name: str,
    model_options: tuple[tuple[str, Any], ...],
    num_steps: int,
    eta: float | None,
    first_step: int,
    s_noise: float,
) -> Plan:
    sampler, schedule = parts(name)
    kind = SAMPLERS[sampler]
    taken = inspect.signature(kind).parameters
    options = {key: value for key, value in model_options if key in taken}
    scheduler = kind(**options | _OPTIONS.get(sampler, {}))
    if isinstance(scheduler, KDiffusion):
        scheduler.eta, scheduler.schedule = eta or 0.0, SCHEDULES[schedule]
    steps = {"original_inference_steps": max(_LCM_STEPS, num_steps)} if kind is LCMScheduler else {}
    scheduler.set_timesteps(num_steps, device="cpu", **steps)
    first = first_step * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    times = list(scheduler.timesteps[first:])
    if kind is PNDMScheduler and first_step:
        times = _plms_times(scheduler.timesteps, first_step)
    given = {"eta": eta, "return_dict": False}
    taken = inspect.signature(scheduler.step).parameters
    scale = s_noise if isinstance(scheduler, KDiffusion) and scheduler.heeds_s_noise else 1.0
    return plans.read(scheduler, times, {name: value for name, value in given.items() if name in taken}, scale)


def _plms_times(timesteps: torch.Tensor, first_step: int) -> list[torch.Tensor]:
    """From a later step on: PLMS evaluates its second time twice, wherever it begins."""
    times = list(timesteps[1 + first_step :])  # the second one is there twice already
    return times[:2] + times[1:]
