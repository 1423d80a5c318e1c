"""The GPU worker: takes jobs from the queue's Work stream or from its own Generate RPC and runs them on one engine."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("esd")
except PackageNotFoundError:
    VERSION = "0+source"
