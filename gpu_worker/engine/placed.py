"""A checkpoint in memory, with all that belongs to its place on the device: the bound on its UNet calls, their CUDA
graphs, and the fast forms of UNet and VAE."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import structlog
import torch

from gpu_worker.devices import Cpu
from gpu_worker.engine import fast
from gpu_worker.engine.bounds import Bound
from gpu_worker.engine.denoise import CHUNK_TOKENS, LATENT_SCALE, called
from gpu_worker.engine.graphs import Forward, Graphs, shape_of
from gpu_worker.engine.settings import EngineSettings
from gpu_worker.models.weights import Models

log = structlog.get_logger()

# Of free memory, what calls are taken to have: it is cut into pieces.
_USABLE_SHARE = 0.8
_PROBE_ROWS = 2
# Code that was compiled for a few rows might not hold for so many.
_MANY_ROWS = 16
# Lengths of prompts that fast forms are made for: where those of up to 225 tokens meet.
_FAST_CHUNKS = (1, 2, 3, 6)

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


class Placed:
    """Models that come and go. All but `enter` belongs to the engine's thread."""

    def __init__(self, models: Models, device: Cpu, settings: EngineSettings) -> None:
        self.models = models
        self.num_bytes = models.block.num_bytes
        self.bound = Bound(settings.max_pixels or device.max_pixels)
        self.graphs: Graphs | None = None
        self.is_settled = False
        # Its last call that did not fit was answered with that.
        self.gave_up_graphs = False
        self._device = device
        self._settings = settings
        self._max_pixels = self.bound.pixels
        self._fast: Any = None
        self._bytes_per_pixel = 0.0

    def enter(self) -> None:
        """Brings the models to the device, and compiles for them what is not compiled yet."""
        began = time.monotonic()
        with self._device.aside():
            self.models.block.enter()
        log.info("model on its device", seconds=round(time.monotonic() - began, 2), num_bytes=self.num_bytes)
        if self._device.can_capture and self._settings.fast_forms:
            began = time.monotonic()
            try:
                with self._device.aside(), torch.inference_mode():
                    self._prepare_fast_forms()
            except Exception as error:  # of compilers there are many kinds
                self._give_up_fast_forms()
                log.warning("the models have no fast form", reason=str(error).partition("\n")[0])
            else:
                log.info("fast forms of the models ready", seconds=round(time.monotonic() - began, 2))

    def leave(self) -> None:
        """Takes the models off the device."""
        self._device.synchronize()
        if self.graphs is not None:
            self.graphs.clear()
        self.graphs = None
        self._give_up_fast_forms()
        self.is_settled = False
        self.models.block.leave()

    def forget(self) -> None:
        """Gives up the copy in the host's memory."""
        self.models.block.forget()

    def settle(self) -> None:
        """Makes ready for ticks what has just come to the device: learns how much memory a row takes."""
        self.is_settled = True
        if self._device.free_bytes() is not None and not self._bytes_per_pixel:
            size = self._native_size()
            inputs = self._inputs(_PROBE_ROWS)

            def call() -> torch.Tensor:
                with torch.inference_mode():
                    return called(self.models.unet, *inputs)

            # The first call also makes what libraries keep. A load that gives memory back meanwhile can hide all of
            # it: then it is learnt when the models come again.
            peak = max(0, min(self._device.peak_bytes(call) for _ in range(2)))
            self._bytes_per_pixel = peak / (_PROBE_ROWS * size * size * LATENT_SCALE**2)
        if self._device.can_capture and self._settings.graphs:
            self.graphs = Graphs(self._forward(self.models.unet), self._device, self._bytes_per_pixel)
            if self._fast is not None:
                calls = [self._inputs(_PROBE_ROWS, num_chunks) for num_chunks in _FAST_CHUNKS]
                self.graphs.prepared(self._forward(self._fast), {shape_of(x, text) for x, _, text, _ in calls})

    def allow(self, free_bytes: int | None) -> None:
        """Bounds calls by the memory that is free."""
        if free_bytes is not None and self._bytes_per_pixel:
            self.bound.allow(min(self._max_pixels, int(_USABLE_SHARE * free_bytes / self._bytes_per_pixel)))

    def _prepare_fast_forms(self) -> None:
        """Makes the fast forms for the size that the UNet was made for, and compiles them by calling them."""
        self._fast = fast.unet_of(self.models.unet, self._settings.compiled, self._settings.fp8)
        for num_chunks in _FAST_CHUNKS:
            called(self._fast, *self._inputs(_PROBE_ROWS, num_chunks))
            with suppress(torch.OutOfMemoryError):
                called(self._fast, *self._inputs(_MANY_ROWS, num_chunks))
        if self._settings.compiled:
            vae = fast.vae_of(self.models.vae)
            size = self._native_size()
            vae.decode(torch.zeros(1, vae.config.latent_channels, size, size, device=vae.device, dtype=vae.dtype))
            self.models = replace(self.models, fast_vae=vae)

    def _give_up_fast_forms(self) -> None:
        self._fast = None
        self.models = replace(self.models, fast_vae=None)

    def _forward(self, unet: Any) -> Forward:
        return lambda *inputs: called(unet, *inputs)

    def _native_size(self) -> int:
        """Latents of a side that the UNet was made for."""
        size: int = self.models.unet.config.sample_size
        return size

    def _inputs(self, num_rows: int, num_chunks: int = 1) -> Inputs:
        """What a call of so many rows at the native size reads, with prompts of so many chunks, all zero."""
        models, size = self.models, self._native_size()
        options: Any = {"device": models.device, "dtype": models.dtype}
        config = models.unet.config
        text = torch.zeros(num_rows, num_chunks * CHUNK_TOKENS, config.cross_attention_dim, **options)
        added = {}
        if models.is_sdxl:
            num_ids = 5 if models.is_refiner else 6
            width = config.projection_class_embeddings_input_dim - num_ids * config.addition_time_embed_dim
            added["text_embeds"] = torch.zeros(num_rows, width, **options)
            added["time_ids"] = torch.zeros(num_rows, num_ids, **options)
        x = torch.zeros(num_rows, config.in_channels, size, size, **options)
        return x, torch.zeros(num_rows, device=models.device), text, added
