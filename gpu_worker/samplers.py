"""A1111's samplers as diffusers schedulers: a table, and who understands the names in a payload.

services/inference/payload.py has the same names, because it refuses a job before it waits; a test keeps them equal.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_dpmsolver_sde import DPMSolverSDEScheduler
from diffusers.schedulers.scheduling_dpmsolver_singlestep import DPMSolverSinglestepScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_k_dpm_2_ancestral_discrete import KDPM2AncestralDiscreteScheduler
from diffusers.schedulers.scheduling_k_dpm_2_discrete import KDPM2DiscreteScheduler
from diffusers.schedulers.scheduling_lcm import LCMScheduler
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

from gpu_worker.job import JobError

_KARRAS = ("Uniform", "Karras", "Exponential", "Beta")
_ALL = ("Uniform", "Karras", "Exponential", "SGM Uniform", "Beta")


@dataclass(frozen=True)
class Sampler:
    """A diffusers scheduler with the options that make it A1111's sampler, and the noise schedules it can follow."""

    scheduler: type[Any]
    options: dict[str, Any] = field(default_factory=dict)
    schedules: tuple[str, ...] = ("Uniform",)
    # What A1111's `Automatic` means for this sampler (modules/sd_samplers_kdiffusion.py, the option `scheduler`).
    automatic: str = "Uniform"


def _multistep(order: int, algorithm: str, **options: Any) -> tuple[type[Any], dict[str, Any]]:
    base = {"timestep_spacing": "linspace", "solver_order": order, "algorithm_type": algorithm}
    return DPMSolverMultistepScheduler, base | options


# Options that bend the noise levels.
SCHEDULES: dict[str, dict[str, Any]] = {
    "Uniform": {},
    "Karras": {"use_karras_sigmas": True},
    "Exponential": {"use_exponential_sigmas": True},
    "SGM Uniform": {"timestep_spacing": "trailing"},
    "Beta": {"use_beta_sigmas": True},
}
_LINSPACE = {"timestep_spacing": "linspace"}
_LEADING = {"timestep_spacing": "leading"}
SAMPLERS = {
    "Euler": Sampler(EulerDiscreteScheduler, _LINSPACE, _ALL),
    "Euler a": Sampler(EulerAncestralDiscreteScheduler, _LINSPACE, ("Uniform", "SGM Uniform")),
    "LMS": Sampler(LMSDiscreteScheduler, _LINSPACE, _ALL),
    "Heun": Sampler(HeunDiscreteScheduler, _LINSPACE, _ALL),
    "DPM2": Sampler(KDPM2DiscreteScheduler, _LINSPACE, _ALL, "Karras"),
    "DPM2 a": Sampler(KDPM2AncestralDiscreteScheduler, _LINSPACE, _ALL, "Karras"),
    # Deterministic here: diffusers has no sampler with A1111's ancestral noise.
    "DPM++ 2S a": Sampler(DPMSolverSinglestepScheduler, {"lower_order_final": True}, _KARRAS, "Karras"),
    "DPM++ 2M": Sampler(*_multistep(2, "dpmsolver++"), _ALL, "Karras"),
    "DPM++ SDE": Sampler(DPMSolverSDEScheduler, _LINSPACE, _ALL, "Karras"),
    "DPM++ 2M SDE": Sampler(*_multistep(2, "sde-dpmsolver++"), _ALL, "Exponential"),
    "DPM++ 2M SDE Heun": Sampler(*_multistep(2, "sde-dpmsolver++", solver_type="heun"), _ALL, "Exponential"),
    "DPM++ 3M SDE": Sampler(*_multistep(3, "sde-dpmsolver++"), _ALL, "Exponential"),
    # An approximation: A1111's chooses its orders by the number of steps in another way.
    "DPM fast": Sampler(DPMSolverSinglestepScheduler, {"solver_order": 3, "lower_order_final": True}),
    "DDIM": Sampler(DDIMScheduler, _LEADING | {"clip_sample": False, "set_alpha_to_one": False}),
    "PLMS": Sampler(PNDMScheduler, _LEADING | {"skip_prk_steps": True, "set_alpha_to_one": False}),
    # bh1 of order 3 gives NaN at the final noise level 0.
    "UniPC": Sampler(UniPCMultistepScheduler, _LEADING | {"solver_order": 3, "solver_type": "bh2"}),
    "LCM": Sampler(LCMScheduler, _LEADING | {"clip_sample": False}),
}
# A1111 has these too; they choose their own number of steps, or go back in noise, which no scheduler here does.
REFUSED = ("DPM adaptive", "Restart")
_MODEL_OPTIONS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "steps_offset", "prediction_type")
_LCM_STEPS = 50  # of the teacher


class Sampling:
    """A sampler at work on the images of one batch of one job: all its state, the noise of each row included.

    Timesteps are on the CPU, where reading them does not wait for the GPU.
    """

    def __init__(self, scheduler: Any, num_steps: int, generators: list[torch.Generator], eta: float) -> None:
        self._scheduler = scheduler
        steps: dict[str, Any] = {}
        if isinstance(scheduler, LCMScheduler):
            steps["original_inference_steps"] = max(_LCM_STEPS, num_steps)
        scheduler.set_timesteps(num_steps, device="cpu", **steps)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        taken = inspect.signature(scheduler.step).parameters
        given = {"generator": generators, "eta": eta, "return_dict": False}
        self._options = {name: value for name, value in given.items() if name in taken}
        self._times = list(scheduler.timesteps)
        # One for each evaluation of the UNet, of which some samplers have two in a step.
        self.timesteps = [float(time) for time in self._times]

    def latents(self, noise: torch.Tensor) -> torch.Tensor:
        """The latents to begin with, from noise of deviation 1."""
        latents: torch.Tensor = noise * self._scheduler.init_noise_sigma
        return latents

    def scaled(self, latents: torch.Tensor, index: int) -> torch.Tensor:
        """The UNet's input for the evaluation of that index."""
        scaled: torch.Tensor = self._scheduler.scale_model_input(latents, self._times[index])
        return scaled

    def step(self, prediction: torch.Tensor, index: int, latents: torch.Tensor) -> torch.Tensor:
        """The latents after the evaluation of that index."""
        after: torch.Tensor = self._scheduler.step(prediction, self._times[index], latents, **self._options)[0]
        return after


def create(
    name: str,
    schedule: str,
    model_config: dict[str, Any],
    num_steps: int,
    generators: list[torch.Generator],
    eta: float = 0.0,
) -> Sampling:
    """A fresh sampler for rows with these generators of noise. `eta` is DDIM's.

    `name` may end in a schedule (`DPM++ 2M Karras`); `schedule` is the payload's `scheduler`, empty when absent.

    Raises:
        JobError: no such sampler, or it cannot follow that schedule.
    """
    sampler, schedule = find(name, schedule)
    taken = inspect.signature(sampler.scheduler).parameters
    options = {key: model_config[key] for key in _MODEL_OPTIONS if key in model_config and key in taken}
    options |= sampler.options | SCHEDULES[schedule]
    if sampler.scheduler is DPMSolverSDEScheduler:
        # One Brownian tree for each row; diffusers' own batch draws all rows from one.
        options["noise_sampler_seed"] = [generator.initial_seed() for generator in generators]
    return Sampling(sampler.scheduler(**options), num_steps, generators, eta)


def find(name: str, schedule: str) -> tuple[Sampler, str]:
    """The sampler and the schedule that a payload's names mean.

    Raises:
        JobError: no such sampler, or it cannot follow that schedule.
    """
    sampler_name, schedule_name = _split(name, schedule)
    sampler = SAMPLERS.get(sampler_name)
    if sampler is None:
        problem = "cannot be run here" if sampler_name in REFUSED else "is not known"
        raise JobError(f"sampler {name!r} {problem}; possible: {', '.join(SAMPLERS)}")
    if schedule_name == "Automatic":
        schedule_name = sampler.automatic
    if schedule_name not in sampler.schedules:
        possible = ", ".join(("Automatic", *sampler.schedules))
        raise JobError(f"sampler {sampler_name!r} has no scheduler {schedule_name!r}; possible: {possible}")
    return sampler, schedule_name


def names() -> list[str]:
    """All names that a payload may give, as A1111 1.8 labels them."""
    return [
        name if schedule == "Uniform" else f"{name} {schedule}"
        for name, sampler in SAMPLERS.items()
        for schedule in sampler.schedules
    ]


def _split(name: str, schedule: str) -> tuple[str, str]:
    """Sampler and schedule; the name's own ending wins, and without either the schedule is uniform, as in A1111 1.8."""
    samplers = {known.lower(): known for known in (*SAMPLERS, *REFUSED)}
    schedules = {known.lower(): known for known in (*SCHEDULES, "Automatic")}
    name = name.strip()
    for ending, known in schedules.items():
        stem = name.lower().removesuffix(f" {ending}")
        if stem in samplers and stem != name.lower():
            return samplers[stem], known
    return samplers.get(name.lower(), name), schedules.get(schedule.lower(), schedule) or "Uniform"
