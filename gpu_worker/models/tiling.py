"""Pictures that can be laid beside each other: convolutions that go on at the opposite edge."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn import Conv2d


@contextmanager
def circular(model: Any, is_on: bool) -> Iterator[None]:
    """Within it, the model's convolutions are padded with what lies at the opposite edge, instead of zeros."""
    layers = [layer for layer in model.modules() if isinstance(layer, Conv2d)] if is_on else []
    for layer in layers:
        layer.padding_mode = "circular"
    try:
        yield
    finally:
        for layer in layers:
            layer.padding_mode = "zeros"
