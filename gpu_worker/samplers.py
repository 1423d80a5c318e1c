"""A1111's samplers as diffusers schedulers: a table, and who understands the names in a payload."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

from gpu_worker.job import JobError


@dataclass(frozen=True)
class Sampler:
    """A diffusers scheduler with the options that make it A1111's sampler, and the noise schedules it can follow."""

    scheduler: type[Any]
    options: dict[str, Any]
    schedules: tuple[str, ...] = ("Uniform",)
    # What A1111's `Automatic` means for this sampler (modules/sd_samplers_kdiffusion.py, the option `scheduler`).
    automatic: str = "Uniform"


@dataclass(frozen=True)
class Schedule:
    """Options that bend the noise levels."""

    options: dict[str, Any] = field(default_factory=dict)


SCHEDULES = {"Uniform": Schedule(), "Karras": Schedule({"use_karras_sigmas": True})}
SAMPLERS = {
    "Euler": Sampler(EulerDiscreteScheduler, {"timestep_spacing": "linspace"}, ("Uniform", "Karras")),
    "Euler a": Sampler(EulerAncestralDiscreteScheduler, {"timestep_spacing": "linspace"}),
    "DPM++ 2M": Sampler(
        DPMSolverMultistepScheduler,
        {"timestep_spacing": "linspace", "algorithm_type": "dpmsolver++", "solver_order": 2},
        ("Uniform", "Karras"),
        "Karras",
    ),
}
_MODEL_OPTIONS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "steps_offset", "prediction_type")


def create(name: str, schedule: str, model_config: dict[str, Any]) -> Any:
    """A fresh scheduler for one batch of one job: all of the sampler's state lives in it.

    `name` may end in a schedule (`DPM++ 2M Karras`); `schedule` is the payload's `scheduler`, empty when absent.

    Raises:
        JobError: no such sampler, or it cannot follow that schedule.
    """
    sampler_name, schedule_name = _split(name, schedule)
    sampler = SAMPLERS.get(sampler_name)
    if sampler is None:
        raise JobError(f"sampler {name!r} is not known; possible: {', '.join(names())}")
    if schedule_name == "Automatic":
        schedule_name = sampler.automatic
    if schedule_name not in sampler.schedules:
        possible = ", ".join(("Automatic", *sampler.schedules))
        raise JobError(f"sampler {sampler_name!r} has no scheduler {schedule_name!r}; possible: {possible}")
    options = {key: model_config[key] for key in _MODEL_OPTIONS if key in model_config}
    return sampler.scheduler(**options, **sampler.options, **SCHEDULES[schedule_name].options)


def names() -> list[str]:
    """All names that a payload may give, as A1111 1.8 labels them."""
    return [
        name if schedule == "Uniform" else f"{name} {schedule}"
        for name, sampler in SAMPLERS.items()
        for schedule in sampler.schedules
    ]


def _split(name: str, schedule: str) -> tuple[str, str]:
    """Sampler and schedule; the name's own ending wins, and without either the schedule is uniform, as in A1111 1.8."""
    sampler = next((known for known in SAMPLERS if known.lower() == name.strip().lower()), None)
    if sampler is not None:
        wanted = next((known for known in (*SCHEDULES, "Automatic") if known.lower() == schedule.lower()), schedule)
        return sampler, wanted or "Uniform"
    for ending in SCHEDULES:
        stem = name.strip()[: -len(ending) - 1]
        if name.strip().lower().endswith(f" {ending.lower()}"):
            return _split(stem, ending)
    return name, schedule
