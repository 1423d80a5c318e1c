"""Sizes of pictures: which shape each is trained at, and batches of pictures that share one."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from services.common.payloads.training import Training

Size = tuple[int, int]  # width, height


class Sized(Protocol):
    """Something that is trained at a size."""

    @property
    def bucket(self) -> Size:
        """The size."""


T = TypeVar("T", bound=Sized)


@dataclass(frozen=True)
class Buckets:
    """The shapes of a training."""

    resolution: Size
    shapes: tuple[Size, ...]
    step: int
    no_upscale: bool

    @classmethod
    def of(cls, config: Training) -> Buckets:
        """Those of a configuration. Without buckets there is one shape, the resolution itself."""
        shapes: tuple[Size, ...] = (config.resolution,)
        if config.enable_bucket:
            shapes = tuple(
                _shapes(config.resolution, config.min_bucket_reso, config.max_bucket_reso, config.bucket_reso_steps)
            )
        no_upscale = config.enable_bucket and config.bucket_no_upscale
        return cls(config.resolution, shapes, config.bucket_reso_steps, no_upscale)

    def shape_of(self, size: Size) -> Size:
        """The shape for a picture: its own if there is one, else that of the nearest ratio of width to height."""
        if self.no_upscale and size[0] * size[1] < self.resolution[0] * self.resolution[1]:
            width, height = (max(self.step, side // self.step * self.step) for side in size)
            return width, height
        if size in self.shapes:
            return size
        ratio = size[0] / size[1]
        return min(self.shapes, key=lambda shape: abs(shape[0] / shape[1] - ratio))


def _shapes(resolution: Size, smallest: int, largest: int, step: int) -> list[Size]:
    """All shapes with sides in steps whose area is at most that of the resolution, as large as each width allows
    (kohya's sd-scripts, library/model_util.py, make_bucket_resolutions). A resolution below the smallest side has
    shapes from its own smaller side on."""
    area = resolution[0] * resolution[1]
    square = max(step, math.isqrt(area) // step * step)
    smallest = min(-(-smallest // step) * step, square)
    found = {(square, square)}
    for width in range(smallest, largest + 1, step):
        height = min(largest, area // width // step * step)
        if height >= smallest:
            found |= {(width, height), (height, width)}
    return sorted(found)


def batches(items: Sequence[T], batch_size: int, chance: random.Random) -> list[list[T]]:
    """All items once, in batches of one shape each, in a random order. The last batch of a shape may be smaller."""
    by_shape: dict[Size, list[T]] = defaultdict(list)
    for item in items:
        by_shape[item.bucket].append(item)
    found = []
    for _, group in sorted(by_shape.items()):
        chance.shuffle(group)
        found += [group[start : start + batch_size] for start in range(0, len(group), batch_size)]
    chance.shuffle(found)
    return found
