"""How the engine uses its device: what may be set, and what is good without."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineSettings:
    """Where and how the engine runs.

    `num_threads` of torch on the CPU; 0 is torch's own choice. `max_pixels` bounds rows x pixels of a UNet call;
    `model_bytes` and `copy_bytes` bound what models take on the device and their copies in the host's memory; None is
    what the device makes of it. `precision` is auto, float16, bfloat16 or float32. On CUDA, `graphs` has UNet calls
    captured as CUDA graphs, and with them `compiled` compiles the blocks of UNet and decoder while a checkpoint is
    loaded, `fp8` multiplies in FP8 (with bfloat16 only): both for pictures of the size that the UNet was made for.
    """

    device: str = "auto"
    num_threads: int = 0
    max_pixels: int | None = None
    model_bytes: int | None = None
    copy_bytes: int | None = None
    precision: str = "auto"
    graphs: bool = True
    compiled: bool = False
    fp8: bool = False

    @property
    def fast_forms(self) -> tuple[str, ...]:
        """Names of what makes UNet calls faster than they are, which only those that are CUDA graphs can be."""
        return tuple(form for form in ("compiled", "fp8") if getattr(self, form) and self.graphs)
