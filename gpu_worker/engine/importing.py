"""Owns how torch and diffusers are imported, which is most of a worker's start."""

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


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


def find_hidden(module: str) -> ModuleType:
    """A module of a package that nobody finds by itself, see gpu_worker/__init__.py."""
    package = module.partition(".")[0]
    if sys.modules.get(package, package) is None:
        del sys.modules[package]
    return importlib.import_module(module)
