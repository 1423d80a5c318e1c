"""A1111's scripts in a payload: which would change the picture in a way that cannot be had here.

Those are refused by name when they are switched on. A script that is off, or that nobody here knows, changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from services.common.payloads.controlnet import units, unused
from services.common.payloads.showing import OFF, says, shown


def _first_says_so(arguments: list[Any]) -> bool:
    return bool(arguments) and says(arguments[0])


def _names_model(arguments: list[Any]) -> bool:
    """ADetailer is on unless its first argument says no, and has a model in each of its tabs that are on."""
    tabs = [
        argument for argument in arguments if isinstance(argument, dict) and argument.get("ad_tab_enable") not in OFF
    ]
    return _first_says_so(arguments) and any(says(tab.get("ad_model")) for tab in tabs)


def _is_enabled(arguments: list[Any]) -> bool:
    return any(isinstance(argument, dict) and says(argument.get("enable")) for argument in arguments)


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
    "animatediff": _Refused(_is_enabled, "pictures are possible, videos are not; disable it"),
    "tiled diffusion": _Refused(_first_says_so, "sizes up to 4096 are denoised as a whole; disable it"),
}
# Known, and without an effect on the picture: they save memory, or repeat what the payload says elsewhere.
_HARMLESS = ("seed", "comments", "extra options", "hypertile", "sampler", "tiled vae")


def check_scripts(scripts: Any) -> list[str]:
    """Looks at `alwayson_scripts`; answers the names of what does nothing though it seems to be on: scripts that have
    arguments and are not known, or whose arguments are no list, and what ControlNet has no use for. A script whose
    first argument is false is off, as scripts have it by custom.

    Raises:
        ValueError: one that cannot be had is switched on.
    """
    without_effect = []
    for name, arguments in _arguments(scripts):
        known = name.strip().lower()
        if arguments is None:
            without_effect += [f"script {name}, whose args are no list"] if says(scripts[name]) else []
            continue
        refused = _REFUSED.get(known)
        if refused is not None and refused.is_on(arguments):
            raise ValueError(f"the script {shown(name)} cannot be run here: {refused.instead}")
        if refused is None and known not in {*_HARMLESS, *_FIELDS} and arguments and arguments[0] is not False:
            without_effect.append(f"script {name}")
        if known == "controlnet":
            without_effect += unused(arguments)
    return without_effect


def as_fields(scripts: Any) -> dict[str, Any]:
    """What scripts say that are part of the payload here.

    Raises:
        ValueError: one of them cannot be had as it is.
    """
    found: dict[str, Any] = {}
    for name, arguments in _arguments(scripts):
        read = _FIELDS.get(name.strip().lower())
        if read is not None and arguments is not None:
            found |= read(arguments)
    return found


def _arguments(scripts: Any) -> Iterator[tuple[str, list[Any] | None]]:
    """Each script's name and arguments, None where those are no list."""
    for name, script in (scripts if isinstance(scripts, dict) else {}).items():
        arguments = script.get("args") if isinstance(script, dict) else None
        yield name, arguments if isinstance(arguments, list) else None


def _refiner(arguments: list[Any]) -> dict[str, Any]:
    """[enabled, checkpoint, switch at]."""
    if not _first_says_so(arguments):
        return {}
    return dict(zip(("refiner_checkpoint", "refiner_switch_at"), arguments[1:], strict=False))


_FIELDS: dict[str, Callable[[list[Any]], dict[str, Any]]] = {
    "refiner": _refiner,
    "controlnet": lambda arguments: {"controlnet": units(arguments)},
}
