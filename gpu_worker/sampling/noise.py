"""The noise that a picture begins with, as A1111 draws it: by seed, varied by a second seed, resized from another size.

It is drawn on the CPU in fp32, also where it is that of A1111's GPU: a picture depends neither on the device nor on its
company.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gpu_worker.sampling.philox import Philox
from services.common.payloads import Generation

Generator = torch.Generator | Philox

_LATENT_SCALE = 8  # pixels per latent, both ways
_CHANNELS = 4


def generators(request: Generation, images: Sequence[int]) -> list[Generator]:
    """One for each of these images of the job; its later numbers are the noise of the sampler's steps."""
    return [_generator(request, request.seed_of(image)) for image in images]


def normal(shape: Sequence[int], generator: Generator) -> torch.Tensor:
    """A generator's next noise."""
    if isinstance(generator, Philox):
        return generator.randn(shape)
    return torch.randn(tuple(shape), generator=generator)


def first(request: Generation, images: Sequence[int], rows: Sequence[Generator]) -> torch.Tensor:
    """Noise of shape (rows, 4, height/8, width/8) for these images of the job; draws from each row's generator once."""
    return torch.stack([_image(request, image, row) for image, row in zip(images, rows, strict=True)])


def reseed(request: Generation, images: Sequence[int], rows: Sequence[Generator]) -> None:
    """Makes the generators those of the sampler's steps, where A1111's "eta noise seed delta" gives these other seeds.

    The Brownian trees of SDE samplers keep the pictures' own, as in A1111: those are read when the sampler is made.
    """
    if request.noise_seed_delta:
        for image, row in zip(images, rows, strict=True):
            row.manual_seed(request.seed_of(image) + request.noise_seed_delta)


def _generator(request: Generation, seed: int) -> Generator:
    return torch.Generator("cpu").manual_seed(seed) if request.noise_source == "CPU" else Philox(seed)


def _image(request: Generation, image: int, row: Generator) -> torch.Tensor:
    shape = (_CHANNELS, request.height // _LATENT_SCALE, request.width // _LATENT_SCALE)
    small = (_CHANNELS, request.seed_resize_from_h // _LATENT_SCALE, request.seed_resize_from_w // _LATENT_SCALE)
    own = normal(shape, row)
    if min(small) <= 0 or small == shape:
        return _varied(request, image, own)
    resized = normal(small, _generator(request, request.seed_of(image)))
    return _pasted(_varied(request, image, resized), own)


def _varied(request: Generation, image: int, noise: torch.Tensor) -> torch.Tensor:
    """The noise on its way to that of the second seed."""
    if not request.subseed_strength:
        return noise
    other = normal(noise.shape, _generator(request, request.subseed_of(image)))
    return _slerp(request.subseed_strength, noise, other)


def _slerp(strength: float, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Spherical interpolation (Shoemake 1985) of tensors of shape (4, h, w). The angle is taken along the height, not
    over the whole noise: that is how A1111's pictures of a variation came to be."""
    cosine = (low / low.norm(dim=1, keepdim=True) * (high / high.norm(dim=1, keepdim=True))).sum(1)
    if cosine.mean() > 0.9995:
        return low * (1 - strength) + high * strength
    angle = torch.acos(cosine)
    low_part, high_part = torch.sin((1 - strength) * angle), torch.sin(strength * angle)
    return (low_part / torch.sin(angle)).unsqueeze(1) * low + (high_part / torch.sin(angle)).unsqueeze(1) * high


def _pasted(small: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The middle of one noise on the middle of the other, whichever is larger in each direction."""
    result = noise.clone()
    source, target = [], []
    for inner, outer in zip(small.shape[1:], noise.shape[1:], strict=True):
        offset = (outer - inner) // 2
        length = inner if offset >= 0 else inner + 2 * offset
        source.append(slice(max(-offset, 0), max(-offset, 0) + length))
        target.append(slice(max(offset, 0), max(offset, 0) + length))
    result[:, *target] = small[:, *source]
    return result
