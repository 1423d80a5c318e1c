"""The GPU worker: takes jobs from the queue's Work stream or from its own Generate RPC and runs them on one engine."""

import sys
from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("esd")
except PackageNotFoundError:
    VERSION = "0+source"

# diffusers and peft import bitsandbytes wherever it is installed: a second, 50 MB, and a look for kernels to fetch from
# a hub. Only an optimizer wants it: engine/importing.py finds it.
sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]
