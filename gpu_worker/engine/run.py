"""A request on its way through the engine: what it needs, who hears of it, and where it is. Knows nothing of torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gpu_worker.audience import Audience
from gpu_worker.files.cache import CachedModel
from gpu_worker.pictures.canvas import Canvas
from services.common.payloads import Generation, Payload
from services.common.payloads.models import BASE, UPSCALER, VAE

if TYPE_CHECKING:
    from gpu_worker.engine.denoise import Evaluation, Task
    from gpu_worker.engine.placed import Placed
    from gpu_worker.models.adapters import Adapter
    from gpu_worker.models.upscaling import Upscaler
    from gpu_worker.models.weights import Models


@dataclass(frozen=True)
class Produced:
    """What the engine made: pixels of shape (height, width, 3) for each image, and where the time went."""

    images: list[NDArray[np.uint8]]
    load_seconds: float
    pipeline_seconds: float
    # Whether an inpainting UNet was told what to paint on.
    is_inpainting: bool = False
    # Embeddings that its checkpoint cannot have.
    unfit: Sequence[CachedModel] = ()


@dataclass(eq=False)
class Equipment:
    """A checkpoint that a run uses, with what the job adds to it: as files, and in memory as far as it is there."""

    base: CachedModel
    vae: CachedModel | None
    additions: list[CachedModel]
    placed: Placed | None = None
    adapters: dict[CachedModel, Adapter] = field(default_factory=dict)

    @property
    def models(self) -> Models | None:
        """Its models, when they are in memory."""
        return self.placed.models if self.placed else None

    @property
    def key(self) -> tuple[str, ...]:
        """What names its models in memory."""
        return (self.base.key, self.vae.key) if self.vae else (self.base.key,)

    @property
    def is_here(self) -> bool:
        """Whether all of it is in memory."""
        return self.placed is not None and len(self.adapters) == len(self.additions)


@dataclass(eq=False)
class Run:
    """A run waits for its models, which it then holds until its end, and is a task from there on. The engine's thread
    calls the listeners: `on_step` with how many of steps x images are done, `on_end` once, with what became of it. The
    thread that draws calls `on_preview`, with a JPEG."""

    job_id: str
    request: Payload
    files: list[CachedModel]
    on_started: Callable[[], None]
    on_step: Callable[[int], None]
    on_end: Callable[[Produced | BaseException], None]
    canvas: Canvas = field(default_factory=Canvas)
    audience: Audience | None = None
    # Somebody waits for it: it goes before those that nobody waits for.
    is_urgent: bool = False
    on_preview: Callable[[bytes], None] = lambda _: None
    task: Task[list[NDArray[np.uint8]]] | None = None
    wish: Evaluation | None = None
    is_started: bool = False
    # It has wished for a UNet call.
    has_ticked: bool = False
    # It did not fit the memory once.
    is_second_try: bool = False
    load_seconds: float = 0.0
    # One for each checkpoint; the job begins with the first.
    equipment: list[Equipment] = field(init=False)
    upscalers: dict[CachedModel, Upscaler] = field(default_factory=dict)
    _since: float = field(default_factory=time.monotonic, init=False)

    def __post_init__(self) -> None:
        vae = next((file for file in self.files if file.type == VAE), None)
        additions = [file for file in self.files if file.type not in {BASE, VAE, UPSCALER}]
        self.equipment = [Equipment(file, vae, list(additions)) for file in self.files if file.type == BASE]

    @property
    def models(self) -> Models | None:
        """Those that the job begins with, when they are here."""
        return self.equipment[0].models if self.equipment else None

    @property
    def is_inpainting(self) -> bool:
        """Whether the job's first UNet is told what it paints on."""
        return self.models is not None and self.models.is_inpainting

    @property
    def is_here(self) -> bool:
        """Whether all that it needs is in memory."""
        has_upscalers = all(file in self.upscalers for file in self.files if file.type == UPSCALER)
        return has_upscalers and all(equipment.is_here for equipment in self.equipment)

    @property
    def is_beginning(self) -> bool:
        """Whether a stage brings it nearer to its first UNet call."""
        return bool(self.equipment) and not self.has_ticked

    @property
    def is_exclusive(self) -> bool:
        """Whether it shares no tick with others."""
        return isinstance(self.request, Generation) and self.request.exclusive

    @property
    def placed(self) -> Placed:
        """The checkpoint whose UNet it wishes for."""
        assert self.wish is not None
        unet = self.wish.step.unet
        return next(one.placed for one in self.equipment if one.placed and one.placed.models.unet is unet)

    def lap(self) -> float:
        """Seconds since the last lap."""
        before, self._since = self._since, time.monotonic()
        return self._since - before
