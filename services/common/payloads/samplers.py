"""The names of A1111's samplers and of the noise schedules that each can follow.

gpu_worker/sampling/samplers.py makes them of diffusers' schedulers; a test keeps the two equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from services.common.payloads.showing import shown


@dataclass(frozen=True)
class Sampler:
    """The noise schedules that a sampler can follow, of which the first is the one that its name alone means, and the
    one that `Automatic` means for it (A1111's modules/sd_samplers_kdiffusion.py, the option `scheduler`). One with no
    other schedule than its own ignores what a payload says of it, as A1111's do that count timesteps or only know a
    first and a last level."""

    schedules: tuple[str, ...] = ("Uniform",)
    automatic: str = "Uniform"
    # The share of new noise in a step, of those that have one, where nobody says it.
    eta: float | None = None
    # That noise is of one process in time, for which dozens of draws make each step's.
    is_brownian: bool = False

    @property
    def has_choice(self) -> bool:
        """Of schedules."""
        return len(self.schedules) > 1


_ALL = ("Uniform", "Karras", "Exponential", "SGM Uniform", "Simple", "Beta")
# Others of A1111's that are the same, as long as its settings say no more.
_SAME = {"normal": "Uniform", "polyexponential": "Exponential"}
SAMPLERS = {
    "Euler": Sampler(_ALL),
    "Euler a": Sampler(_ALL, eta=1),
    "LMS": Sampler(_ALL),
    "Heun": Sampler(_ALL),
    "DPM2": Sampler(_ALL, "Karras"),
    "DPM2 a": Sampler(_ALL, "Karras", eta=1),
    "DPM++ 2S a": Sampler(_ALL, "Karras", eta=1),
    "DPM++ 2M": Sampler(_ALL, "Karras"),
    "DPM++ SDE": Sampler(_ALL, "Karras", eta=1, is_brownian=True),
    "DPM++ 2M SDE": Sampler(_ALL, "Exponential", eta=1, is_brownian=True),
    "DPM++ 2M SDE Heun": Sampler(_ALL, "Exponential", eta=1, is_brownian=True),
    "DPM++ 3M SDE": Sampler(_ALL, "Exponential", eta=1, is_brownian=True),
    "DPM fast": Sampler(eta=1),
    "Restart": Sampler(("Karras",)),
    "DDIM": Sampler(eta=0),
    "PLMS": Sampler(),
    "UniPC": Sampler(),
    "LCM": Sampler(),
}
# A1111 has it too; how many steps it makes follows from the pictures, and no scheduler here waits for those.
REFUSED = ("DPM adaptive",)


def names() -> list[str]:
    """All names that a checked payload may have, as A1111 1.8 labels them."""
    return [_label(name, schedule) for name, sampler in SAMPLERS.items() for schedule in sampler.schedules]


def find(given: Any, scheduler: Any, field: str = "sampler_name") -> str:
    """A sampler and its schedule as one name, such as `DPM++ 2M Karras`. Without a `scheduler` a bare name means the
    uniform schedule, as A1111 1.8 labels it; a schedule that the name ends in wins.

    Raises:
        ValueError: no such sampler, or it cannot follow that schedule; the message says what is possible.
    """
    name, ending = _split(given)
    if not isinstance(name, str) or name not in SAMPLERS:
        problem = "cannot be run here" if name in REFUSED else "is not known"
        raise ValueError(f"{field} {shown(given)} {problem}; possible: {', '.join(SAMPLERS)}")
    sampler = SAMPLERS[name]
    if not sampler.has_choice:
        return name
    possible = {_key(known): known for known in sampler.schedules} | _SAME
    possible["automatic"] = sampler.automatic
    wanted = ending or scheduler or sampler.schedules[0]
    schedule = possible.get(_key(wanted)) if isinstance(wanted, str) else None
    if schedule is None:
        choice = ", ".join(("Automatic", *sampler.schedules))
        raise ValueError(f"scheduler {shown(wanted)} does not go with {field} {shown(name)}; possible: {choice}")
    return _label(name, schedule)


def schedule_of(given: Any, scheduler: Any) -> Any:
    """The schedule that a payload asks for, with a sampler's name or beside it."""
    return _split(given)[1] or scheduler or "Uniform"


def without_schedule(given: Any) -> Any:
    """A sampler's own name."""
    return _split(given)[0]


def ignores(given: Any, scheduler: Any) -> bool:
    """Whether a payload asks for another schedule than the only one that its sampler has."""
    name, ending = _split(given)
    sampler, wanted = SAMPLERS.get(name) if isinstance(name, str) else None, ending or scheduler or "Automatic"
    return (
        sampler is not None
        and not sampler.has_choice
        and _key(str(wanted)) not in {"automatic", _key(sampler.schedules[0])}
    )


def sampler_of(name: str) -> Sampler:
    """What is known of the sampler in a checked name."""
    return SAMPLERS[parts(name)[0]]


def parts(name: str) -> tuple[str, str]:
    """The sampler and the schedule in a checked name."""
    sampler, schedule = _split(name)
    return sampler, schedule or SAMPLERS[sampler].schedules[0]


def _key(schedule: str) -> str:
    """What A1111's label, name and alias of a schedule have in common: `SGM Uniform`, `sgm_uniform`, `SGMUniform`."""
    return schedule.lower().replace(" ", "").replace("_", "")


def _label(name: str, schedule: str) -> str:
    return name if schedule == SAMPLERS[name].schedules[0] else f"{name} {schedule}"


def _split(given: Any) -> tuple[Any, str]:
    """A sampler's own name, and the schedule that a name ends in or an empty text."""
    if not isinstance(given, str):
        return given, ""
    samplers = {known.lower(): known for known in (*SAMPLERS, *REFUSED)}
    name = given.strip().lower()
    for schedule in (*_ALL, "Automatic"):
        stem = name.removesuffix(f" {schedule.lower()}")
        if stem in samplers and stem != name:
            return samplers[stem], schedule
    return samplers.get(name, given), ""
