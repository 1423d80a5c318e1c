"""Owns how torch and diffusers are imported, which is most of a worker's start."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """In the block no garbage is collected, and what it leaves is not gone through by any later collection.

    Without it the collector goes through the objects of 4,000 modules again and again: a fifth of the imports' time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
