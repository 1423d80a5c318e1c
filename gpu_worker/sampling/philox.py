"""The noise of CUDA's generator without a GPU: what A1111 paints with unless its settings name the CPU's.

Philox 4x32-10 (Salmon et al. 2011, section 4) and Box-Muller as curand has them. A counter is made of how many draws
came before and the number's place in this one; of the four numbers that it gives, the first counts. That is what a GPU
draws as long as it has a thread for each number: any has for 512x512 pixels, all but small ones (T4) for 1024x1024.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch

_ROUNDS: Final = 10
_MULTIPLIERS: Final = 0xD2511F53, 0xCD9E8D57
_WEYL: Final = 0x9E3779B9, 0xBB67AE85  # added to the key from round to round
_LOW: Final = 0xFFFFFFFF
_UNIT = np.float32(2**-32)


class Philox:
    """In the place of a torch.Generator."""

    def __init__(self, seed: int) -> None:
        self.manual_seed(seed)

    def manual_seed(self, seed: int) -> None:
        """Begins with this seed."""
        self._seed = seed
        self._num_draws = 0

    def initial_seed(self) -> int:
        """The seed it began with."""
        return self._seed

    def randn(self, shape: Sequence[int]) -> torch.Tensor:
        """The next draw."""
        numbers: Any = np.arange(math.prod(shape), dtype=np.uint64)
        zeros = np.zeros_like(numbers)
        a, b, c, d = zeros + np.uint64(self._num_draws), zeros, numbers, zeros
        keys = self._seed & _LOW, (self._seed >> 32) & _LOW
        for _ in range(_ROUNDS):
            one, other = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
            a, b, c, d = (other >> 32) ^ b ^ keys[0], other & _LOW, (one >> 32) ^ d ^ keys[1], one & _LOW
            keys = (keys[0] + _WEYL[0]) & _LOW, (keys[1] + _WEYL[1]) & _LOW
        self._num_draws += 1
        length, angle = ((x.astype(np.float32) + np.float32(0.5)) * _UNIT for x in (a, b))
        drawn = np.sqrt(-2 * np.log(length)) * np.sin(2 * np.float32(math.pi) * angle)
        return torch.from_numpy(drawn.reshape(shape))
