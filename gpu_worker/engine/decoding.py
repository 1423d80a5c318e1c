"""Between latents and pixels, in as much memory as there is: what does not fit goes in tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from gpu_worker import devices
from gpu_worker.job import JobError

log = structlog.get_logger()

NAN = "the model produced NaN (not a number) instead of a picture; its weights may be damaged or overflow in fp16"
_MIN_TILE = 16  # latents of a side


class Decoded:
    """A picture on its way from the device."""

    def __init__(self, vae: Any, latents: torch.Tensor, fast_vae: Any = None) -> None:
        found = decode(vae, latents.to(vae.dtype) / vae.config.scaling_factor, fast_vae).float()
        is_finite = torch.isfinite(found).all() & torch.isfinite(latents).all()
        pixels = ((found[0] / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
        self._is_finite, self._pixels = devices.arriving(is_finite), devices.arriving(pixels.contiguous())

    def pixels(self) -> NDArray[np.uint8]:
        """Pixels of shape (height, width, 3); waits for them.

        Raises:
            JobError: the model made no numbers.
        """
        if not bool(self._is_finite()):
            raise JobError(NAN)
        pixels: NDArray[np.uint8] = self._pixels().numpy()
        return pixels


def decode(vae: Any, latents: torch.Tensor, fast_vae: Any = None) -> torch.Tensor:
    """What the decoder makes of latents of shape (1, 4, height/8, width/8); its fast form, if it is given one that was
    compiled for them whole. In tiles it would be compiled anew.

    Raises:
        torch.OutOfMemoryError: not even a tile fits.
    """
    if fast_vae is not None:
        with suppress(torch.OutOfMemoryError):
            fast: torch.Tensor = fast_vae.decode(latents, return_dict=False)[0]
            return fast
    pictures: torch.Tensor = _fitting(vae, latents.shape, lambda: vae.decode(latents, return_dict=False)[0])
    return pictures


def encode(vae: Any, pictures: torch.Tensor) -> torch.Tensor:
    """The latents that the encoder finds likeliest for pictures; see `distribution`."""
    latents: torch.Tensor = distribution(vae, pictures).mode()
    return latents


def distribution(vae: Any, pictures: torch.Tensor) -> Any:
    """How likely the encoder finds which latents (diffusers' DiagonalGaussianDistribution) for pictures of shape
    (n, 3, height, width) in -1..1.

    Raises:
        torch.OutOfMemoryError: not even a tile fits.
    """
    size = [length // _scale(vae) for length in pictures.shape[2:]]
    return _fitting(vae, size, lambda: vae.encode(pictures).latent_dist)


def _fitting(vae: Any, size: Sequence[int], call: Callable[[], Any]) -> Any:
    """Does the call, whose latents have that size, with tiles of half a side for as often as it does not fit."""
    tile = max(size[-2:])
    while True:
        try:
            with _tiled(vae, tile):
                return call()
        except torch.OutOfMemoryError:
            if tile <= _MIN_TILE:
                raise
        devices.make_memory()
        tile = max(tile // 2, _MIN_TILE)
        log.warning("out of memory in the VAE, it goes on in tiles", tile_pixels=_scale(vae) * tile)


@contextmanager
def _tiled(vae: Any, tile: int) -> Iterator[None]:
    """Within it, a VAE takes tiles of so many latents of a side, which overlap; what is not larger, whole."""
    before = vae.use_tiling, vae.tile_latent_min_size, vae.tile_sample_min_size
    vae.use_tiling, vae.tile_latent_min_size, vae.tile_sample_min_size = True, tile, tile * _scale(vae)
    try:
        yield
    finally:
        vae.use_tiling, vae.tile_latent_min_size, vae.tile_sample_min_size = before


def _scale(vae: Any) -> int:
    """Pixels per latent, both ways."""
    scale: int = 2 ** (len(vae.config.block_out_channels) - 1)
    return scale
