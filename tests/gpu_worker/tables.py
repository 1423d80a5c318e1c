"""Owns how long tables of cases are divided: a few are tried at every change, the others with the slow tests.

FEW             each sampler with one of its schedules
SAMPLER_NAMES   all names of samplers: at every change those
COMPANIES       the same in groups of six, of which one is tried at every change
"""

from collections.abc import Iterable
from typing import Any

import pytest

from services.common.payloads import samplers

COMPANY = 6


def _each_sampler_once() -> list[str]:
    """Between them they have every schedule too."""
    labels: dict[str, list[str]] = {}
    for name in samplers.names():
        labels.setdefault(samplers.parts(name)[0], []).append(name)
    return [names[index % len(names)] for index, names in enumerate(labels.values())]


FEW = _each_sampler_once()
OTHERS = [name for name in samplers.names() if name not in FEW]


def slow(cases: Iterable[Any]) -> list[Any]:
    """Cases that are tried with the slow tests; a tuple has a value for each argument."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in cases]


def in_companies(names: list[str]) -> list[list[str]]:
    """The names in groups of COMPANY; the first ones fill up the last."""
    starts = range(0, len(names), COMPANY)
    return [[names[(start + index) % len(names)] for index in range(COMPANY)] for start in starts]


SAMPLER_NAMES = [*FEW, *slow(OTHERS)]
COMPANIES = [in_companies(FEW)[-1], *slow(in_companies(FEW)[:-1] + in_companies(OTHERS))]
