"""Previews: small JPEG files of what a picture will be, from the latents alone, in a thread beside the engine's.

The UNet's prediction tells what it takes the clean latents to be, and a linear map of their channels gives colours. No
decoder runs and nothing waits: what the thread does not manage to draw is not drawn.
"""

from __future__ import annotations

import io
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

import structlog
import torch
from PIL import Image

from gpu_worker.engine.denoise import Evaluation
from gpu_worker.models.weights import Models

log = structlog.get_logger()

MAX_SIZE = 128
_MAX_WAITING = 8
_QUALITY = 80
# From the channels of latents (rows) to red, green and blue in -1..1; fitted to pictures of each family's decoder
# (ComfyUI, comfy/latent_formats.py, latent_rgb_factors).
_SD15 = ((0.3512, 0.2297, 0.3227), (0.3250, 0.4974, 0.2350), (-0.2829, 0.1762, 0.2721), (-0.2120, -0.2616, -0.7177))
_SDXL = ((0.3920, 0.4054, 0.4549), (-0.2634, -0.0196, 0.0653), (0.0568, 0.1687, -0.0755), (-0.3112, -0.2359, -0.2076))


@dataclass(frozen=True, eq=False)
class _Sketch:
    """An evaluation, and what the UNet said to its pictures, of which the first is drawn."""

    evaluation: Evaluation
    prediction: torch.Tensor
    is_sdxl: bool
    show: Callable[[bytes], None]


class Previews:
    """Draws in a thread of its own, which starts with the first preview."""

    def __init__(self) -> None:
        self._sketches: queue.SimpleQueue[_Sketch | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def draw(
        self, models: Models, evaluation: Evaluation, prediction: torch.Tensor, show: Callable[[bytes], None]
    ) -> None:
        """Has the first picture of an evaluation drawn; `show` is called in the other thread."""
        if self._sketches.qsize() >= _MAX_WAITING:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="previews", daemon=True)
            self._thread.start()
        self._sketches.put(_Sketch(evaluation, prediction, models.is_sdxl, show))

    def close(self) -> None:
        """Ends the thread."""
        if self._thread is not None:
            self._sketches.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (sketch := self._sketches.get()) is not None:
            try:
                jpeg = _jpeg(sketch)
            except Exception as error:  # a picture is worth nothing when its job or the device is in trouble
                log.warning("no preview", error=str(error))
                continue
            sketch.show(jpeg)


def colours(latents: torch.Tensor, is_sdxl: bool) -> torch.Tensor:
    """Pixels of shape (height, width, 3), on the CPU, from latents of shape (1, 4, height, width)."""
    if max(latents.shape[2:]) > MAX_SIZE:
        scale = MAX_SIZE / max(latents.shape[2:])
        height, width = (max(1, int(size * scale)) for size in latents.shape[2:])
        latents = torch.nn.functional.adaptive_avg_pool2d(latents, (height, width))
    factors = torch.tensor(_SDXL if is_sdxl else _SD15, device=latents.device)
    rgb = torch.einsum("chw,cr->hwr", latents[0], factors)
    return ((rgb / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def _jpeg(sketch: _Sketch) -> bytes:
    with torch.inference_mode():
        clean = sketch.evaluation.clean(sketch.prediction)[:1]
        pixels = colours(clean, sketch.is_sdxl).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()
