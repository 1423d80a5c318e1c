"""Pictures → latents, once for the whole training where they are cached."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from gpu_worker.devices import on_device
from gpu_worker.engine.decoding import distribution
from gpu_worker.job import JobError
from gpu_worker.models.weights import Models
from gpu_worker.tasks.stages import as_tensor
from gpu_worker.trainer.dataset import Picture


class Latents:
    """The latents of pictures, kept on the CPU; from a second pass of the encoder on where they are not cached."""

    def __init__(self, models: Models, *, cached: bool, flips: bool) -> None:
        self._models = models
        self._cached = cached
        self._sides = (False, True) if flips else (False,)
        self._found: dict[tuple[Picture, bool], torch.Tensor] = {}

    def prepare(
        self, pictures: Sequence[Picture], generator: torch.Generator, on_picture: Callable[[int], None]
    ) -> None:
        """Encodes all pictures, and sends the encoder off the device; nothing where they are not cached.

        Raises:
            JobError: the encoder makes no numbers of a picture.
        """
        if not self._cached:
            return
        for number, picture in enumerate(pictures, 1):
            for flipped in self._sides:
                self._found[picture, flipped] = self._encoded(picture, flipped, generator).cpu()
            on_picture(number)
        self._models.vae.to("cpu")

    def batch(self, pictures: Sequence[Picture], flipped: Sequence[bool], generator: torch.Generator) -> torch.Tensor:
        """The latents of pictures that share a bucket, (n, 4, height/8, width/8) in fp32 on the device."""
        pairs = list(zip(pictures, flipped, strict=True))
        if not self._cached:
            return torch.stack([self._encoded(*pair, generator) for pair in pairs])
        return on_device(torch.stack([self._found[pair] for pair in pairs]), self._models.device)

    def _encoded(self, picture: Picture, flipped: bool, generator: torch.Generator) -> torch.Tensor:
        """One draw of what the encoder finds likely (Rombach et al. 2022, appendix G), as kohya caches it."""
        vae = self._models.vae
        pixels = as_tensor(np.asarray(picture.read()))
        if flipped:
            pixels = pixels.flip(3)
        with torch.no_grad():
            likely = distribution(vae, pixels.to(self._models.device, vae.dtype))
            latents: torch.Tensor = likely.sample(generator)[0].float() * vae.config.scaling_factor
        if not bool(torch.isfinite(latents).all()):
            raise JobError(f"the VAE makes NaN of {picture.path.name}; with no_half_vae=true it computes in fp32")
        return latents
