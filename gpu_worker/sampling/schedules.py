"""A1111's noise schedules: from a number of steps to as many noise levels (k-diffusion's sigma), the highest first.

The formulas are those of k_diffusion/sampling.py and A1111's modules/sd_schedulers.py, in fp32 as there: the noise of
SDE samplers hangs on the last bits of a level. `table` has the model's level of each timestep.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy import stats

Schedule = Callable[[int, torch.Tensor], torch.Tensor]

# Karras' levels are evenly spaced in this root (Karras et al. 2022).
_RHO = 7.0
# Of the distribution that `Beta` is named after (Lee et al. 2024), as A1111 has them unless its settings say more.
_ALPHA = _BETA = 0.6


def uniform(num_steps: int, table: torch.Tensor) -> torch.Tensor:
    """Evenly spaced in time, with both ends."""
    return _at(torch.linspace(len(table) - 1, 0, num_steps), table)


def sgm_uniform(num_steps: int, table: torch.Tensor) -> torch.Tensor:
    """Evenly spaced in time, a step away from its end."""
    return _at(torch.linspace(len(table) - 1, 0, num_steps + 1)[:-1], table)


def simple(num_steps: int, table: torch.Tensor) -> torch.Tensor:
    """Evenly spaced in time, of whole timesteps."""
    return torch.stack([table[-1 - int(step * len(table) / num_steps)] for step in range(num_steps)])


def karras(num_steps: int, table: torch.Tensor) -> torch.Tensor:
    """Evenly spaced in a root."""
    return karras_between(float(table[-1]), float(table[0]), num_steps)


def karras_between(highest: float, lowest: float, num_levels: int) -> torch.Tensor:
    """The same, from one level to another."""
    first, last = highest ** (1 / _RHO), lowest ** (1 / _RHO)
    roots: torch.Tensor = first + torch.linspace(0, 1, num_levels) * (last - first)
    return roots**_RHO


def exponential(num_steps: int, table: torch.Tensor) -> torch.Tensor:
    """Evenly spaced in the logarithm."""
    return torch.linspace(math.log(table[-1]), math.log(table[0]), num_steps).exp()


def beta(num_steps: int, table: torch.Tensor) -> torch.Tensor:
    """Closer to each other towards both ends."""
    places = stats.beta.ppf(1 - np.linspace(0, 1, num_steps), _ALPHA, _BETA)
    lowest, highest = float(table[0]), float(table[-1])
    return torch.tensor([lowest + place * (highest - lowest) for place in places], dtype=torch.float32)


def _at(times: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    logarithms, part = table.log(), times.frac()
    return ((1 - part) * logarithms[times.floor().long()] + part * logarithms[times.ceil().long()]).exp()


SCHEDULES: dict[str, Schedule] = {
    "Uniform": uniform,
    "Karras": karras,
    "Exponential": exponential,
    "SGM Uniform": sgm_uniform,
    "Simple": simple,
    "Beta": beta,
}
