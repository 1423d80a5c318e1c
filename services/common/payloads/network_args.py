"""A training's network_args, `name=value` as sd-scripts and LyCORIS have them: what each may be, and where."""

from __future__ import annotations

import math
from collections.abc import Mapping

KINDS = ("lora", "locon", "loha", "lokr")
# LyCORIS' presets of layers.
PRESETS = (
    "full", "full-lin", "attn-mlp", "attn-only", "unet-only", "unet-transformer-only", "unet-convblock-only",
)  # fmt: skip
MAX_DIM = 100_000
_MAX_FACTORED_DIM = 1024  # beyond it LoKr has one factor whole; the others would only be larger than what they change
# LyCORIS' older names.
_ALIASES = {"use_cp": "use_tucker", "use_conv_cp": "use_tucker"}
# The least and the most of those that are numbers, and which of them are whole.
_NUMBERS = {
    "conv_dim": (0, MAX_DIM), "conv_alpha": (0, 4096), "factor": (-1, 1024), "dropout": (0, 0.99),
    "rank_dropout": (0, 0.99), "module_dropout": (0, 0.99),
}  # fmt: skip
_WHOLE = {"conv_dim", "factor"}
_SWITCHES = {"decompose_both", "full_matrix", "use_tucker"}
# What LyCORIS has and this trainer does not; kohya's GUI writes them all.
_MISSING = {
    "bypass_mode", "constraint", "dora_wd", "rank_dropout_scale", "rescaled", "rs_lora", "train_norm",
    "unbalanced_factorization", "use_scalar", "weight_decompose",
}  # fmt: skip
_ON, _OFF = {"true", "1", "yes"}, {"false", "0", "0.0", "no", "none", "", "-1"}
_PLAIN, _LYCORIS = ("lora", "locon"), ("loha", "lokr")
# The kinds that have them; elsewhere they have to be off, as other tools write them for every kind.
_KINDS_WITH = {
    "dropout": _PLAIN, "rank_dropout": _LYCORIS, "module_dropout": _LYCORIS, "use_tucker": _LYCORIS,
    "factor": ("lokr",), "decompose_both": ("lokr",), "full_matrix": ("lokr",),
}  # fmt: skip


def kind_of(arguments: Mapping[str, str]) -> str:
    """The kind of network."""
    return arguments.get("algo", KINDS[0]).lower()


def is_on(text: str) -> bool:
    """What a switch says."""
    return text.lower() in _ON


def checked(arguments: Mapping[str, str]) -> dict[str, str]:
    """The arguments, their numbers written in one way; a conv_dim of 0 is none, and so is what is off and missing here
    or with this kind of network.

    Raises:
        ValueError: one is not possible, or not with this kind of network.
    """
    if missing := [name for name in arguments if name in _MISSING and arguments[name].lower() not in _OFF]:
        raise ValueError(f"network_args {missing[0]}={arguments[missing[0]]}: it is not supported; leave it out")
    arguments = {_ALIASES.get(name, name): text for name, text in arguments.items() if name not in _MISSING}
    possible = _NUMBERS.keys() | _SWITCHES | {"algo", "preset"}
    if unknown := sorted(arguments.keys() - possible):
        raise _impossible(", ".join(unknown), ", ".join(sorted(possible)))
    kind = kind_of(arguments)
    if kind not in KINDS:
        raise _impossible(f"algo={kind}", ", ".join(KINDS))
    if (preset := arguments.get("preset", "full")) not in PRESETS:
        raise _impossible(f"preset={preset}", ", ".join(PRESETS))
    found = {name: _number(name, text) if name in _NUMBERS else text for name, text in arguments.items()}
    for name, text in found.items():
        if name in _SWITCHES and text.lower() not in _ON | _OFF:
            raise _impossible(f"{name}={text}", "true, false")
        if kind not in _KINDS_WITH.get(name, KINDS) and text.lower() not in _OFF:
            raise ValueError(f"network_args {name}={text} is not possible with algo={kind}; leave it out")
    possible = {name for name in found if kind in _KINDS_WITH.get(name, KINDS)}
    return {name: text for name, text in found.items() if name in possible and (name, text) != ("conv_dim", "0")}


def check_dropout(dropout: float, kind: str) -> None:
    """Refuses a network_dropout that the kind of network does not have.

    Raises:
        ValueError.
    """
    if dropout and kind not in _KINDS_WITH["dropout"]:
        instead = "rank_dropout or module_dropout in network_args"
        raise ValueError(f"network_dropout {dropout} is not possible with algo={kind}; possible: {instead}")


def check_dim(network_dim: int, arguments: Mapping[str, str]) -> None:
    """Refuses a rank that the kind of network does not have.

    Raises:
        ValueError.
    """
    kind = kind_of(arguments)
    for name, dim in (("network_dim", network_dim), ("network_args conv_dim", int(arguments.get("conv_dim", 0)))):
        if dim > _MAX_FACTORED_DIM and kind != "lokr":
            instead = f"1 to {_MAX_FACTORED_DIM}, or with algo=lokr to {MAX_DIM}"
            raise ValueError(f"{name} {dim} is not possible with algo={kind}; possible: {instead}")


def _number(name: str, text: str) -> str:
    low, high = _NUMBERS[name]
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not low <= number <= high or (name in _WHOLE and not number.is_integer()):
        what = "a whole number" if name in _WHOLE else "a number"
        raise _impossible(f"{name}={text}", f"{what} from {low} to {high}")
    return f"{number:g}"


def _impossible(what: str, possible: str) -> ValueError:
    return ValueError(f"network_args {what} is not possible; possible: {possible}")
