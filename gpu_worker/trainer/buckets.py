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
class Fit:
    """The size to which a picture is scaled, and that of its middle, which is trained."""

    scaled: Size
    bucket: Size


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

    def fit(self, size: Size) -> Fit:
        """How a picture of this size is trained: at its own if that is a shape, else at the one of the nearest ratio of
        width to height. Where no picture may grow, each has a shape of its own, within its edges."""
        if self.no_upscale:
            scaled = self._shrunk(size)
            bucket = self._in_steps(scaled[0]), self._in_steps(scaled[1])
            covers = scaled[0] >= bucket[0] and scaled[1] >= bucket[1]  # else it is smaller than one step
            return Fit(scaled if covers else _covering(size, bucket), bucket)
        ratio = size[0] / size[1]
        bucket = min(self.shapes, key=lambda shape: (shape != size, abs(shape[0] / shape[1] - ratio)))
        return Fit(_covering(size, bucket), bucket)

    def _shrunk(self, size: Size) -> Size:
        """The size; or if its area is larger than the resolution's, a smaller one with one side in steps, the one that
        changes the ratio less (kohya's sd-scripts, library/train_util.py, select_bucket)."""
        area, ratio = self.resolution[0] * self.resolution[1], size[0] / size[1]
        if size[0] * size[1] <= area:
            return size
        width, height = (
            self._in_steps(_rounded(math.sqrt(area * ratio))),
            self._in_steps(_rounded(math.sqrt(area / ratio))),
        )
        by_width = width / self._in_steps(_rounded(width / ratio))
        by_height = self._in_steps(_rounded(height * ratio)) / height
        if abs(by_width - ratio) < abs(by_height - ratio):
            return width, _rounded(width / ratio)
        return _rounded(height * ratio), height

    def _in_steps(self, side: int) -> int:
        return max(self.step, side // self.step * self.step)


def _covering(size: Size, bucket: Size) -> Size:
    """The size scaled so that it just covers the bucket."""
    factor = max(bucket[0] / size[0], bucket[1] / size[1])
    width, height = (max(side, _rounded(own * factor)) for own, side in zip(size, bucket, strict=True))
    return width, height


def _rounded(side: float) -> int:
    return int(side + 0.5)


def _shapes(resolution: Size, smallest: int, largest: int, step: int) -> list[Size]:
    """All shapes with sides in steps whose area is at most that of the resolution, as large as each width allows
    (kohya's sd-scripts, library/model_util.py, make_bucket_resolutions). Bounds that are not in steps are widened. A
    resolution below the smallest side has shapes from its own smaller side on."""
    area = resolution[0] * resolution[1]
    square = max(step, math.isqrt(area) // step * step)
    smallest, largest = min(max(step, smallest // step * step), square), -(-largest // step) * step
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
