"""A1111's scripts in a payload: which would change the picture in a way that cannot be had here.

Those are refused by name when they are switched on. A script that is off, or that nobody here knows, changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from services.common.payloads.showing import shown


def _first_is_true(arguments: list[Any]) -> bool:
    return bool(arguments) and arguments[0] is True


def _names_model(arguments: list[Any]) -> bool:
    """ADetailer is on unless its first argument says no, and has a model in each of its tabs."""
    tabs = [argument for argument in arguments if isinstance(argument, dict)]
    return arguments[:1] != [False] and any(tab.get("ad_model", "None") != "None" for tab in tabs)


def _has_enabled(arguments: list[Any]) -> bool:
    return any(isinstance(argument, dict) and argument.get("enabled") is True for argument in arguments)


@dataclass(frozen=True)
class _Refused:
    """A script that cannot be had: how it is seen to be on, and what the client can do."""

    is_on: Callable[[list[Any]], bool]
    instead: str


_NO_FACES = "it needs weights that this service does not have; disable it"
_REFUSED = {
    "reactor": _Refused(lambda arguments: any(value is True for value in arguments[:2]), _NO_FACES),
    "roop": _Refused(lambda arguments: any(value is True for value in arguments[:2]), _NO_FACES),
    "adetailer": _Refused(_names_model, _NO_FACES),
    "animatediff": _Refused(_has_enabled, "pictures are possible, videos are not; disable it"),
    "tiled diffusion": _Refused(_first_is_true, "sizes up to 4096 are denoised as a whole; disable it"),
}
# Known, and without an effect on the picture: they save memory, or repeat what the payload says elsewhere.
_HARMLESS = ("seed", "comments", "extra options", "hypertile", "tiled vae")


def check_scripts(scripts: Any) -> list[str]:
    """Looks at `alwayson_scripts`; answers the names of the scripts that have arguments and are not known.

    Raises:
        ValueError: one that cannot be had is switched on.
    """
    unknown = []
    for name, script in (scripts if isinstance(scripts, dict) else {}).items():
        arguments = script.get("args") if isinstance(script, dict) else None
        arguments = arguments if isinstance(arguments, list) else []
        known = name.strip().lower()
        refused = _REFUSED.get(known)
        if refused is not None and refused.is_on(arguments):
            raise ValueError(f"the script {shown(name)} cannot be run here: {refused.instead}")
        if known == "controlnet":
            _check_units(arguments)
        elif refused is None and known not in {*_HARMLESS, "refiner"} and arguments:
            unknown.append(f"script {name}")
    return unknown


def refiner_of(scripts: Any) -> dict[str, Any]:
    """What the script `refiner` says, as fields of the payload: [enabled, checkpoint, switch at]."""
    for name, script in (scripts if isinstance(scripts, dict) else {}).items():
        if name.strip().lower() == "refiner" and isinstance(script, dict) and isinstance(script.get("args"), list):
            arguments = script["args"]
            if _first_is_true(arguments):
                fields = ("refiner_checkpoint", "refiner_switch_at")
                return dict(zip(fields, arguments[1:], strict=False))
    return {}


def _check_units(units: list[Any]) -> None:
    """ControlNet units: one is on unless it says otherwise, and does nothing without a model."""
    for index, unit in enumerate(units):
        if not isinstance(unit, dict) or unit.get("enabled") is False or unit.get("model") in {None, "", "None"}:
            continue
        raise ValueError(f"controlnet unit {index} is enabled: ControlNet is not supported yet; disable the unit")
