"""Measures speed and memory of the real stack: `make bench`."""

import gpu_worker  # noqa: F401 - hides bitsandbytes, for which diffusers looks as it is imported
