"""Between latents and pixels when memory is short."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_worker.engine import decoding
from gpu_worker.models import weights
from tests.gpu_worker.conftest import as_cached


@pytest.fixture(scope="module")
def vae(tiny_checkpoint: Path) -> Any:
    return weights.load(as_cached(tiny_checkpoint), None, "cpu").vae


@contextmanager
def memory_for(part: torch.nn.Module, max_side: int) -> Iterator[list[int]]:
    """Memory for inputs of so many latents or pixels of a side, and the sides of those that came."""
    sides: list[int] = []

    def before(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        sides.append(max(arguments[0].shape[2:]))
        if sides[-1] > max_side:
            raise torch.OutOfMemoryError

    hook = part.register_forward_pre_hook(before)
    yield sides
    hook.remove()


@torch.inference_mode()
def test_a_picture_that_fits_is_decoded_whole(vae: Any) -> None:
    latents = torch.randn(1, 4, 40, 24)
    with memory_for(vae.decoder, 40) as sides:
        found = decoding.decode(vae, latents)
    assert sides == [40]
    assert torch.equal(found, vae.decode(latents).sample)


@torch.inference_mode()
def test_a_picture_that_does_not_fit_is_decoded_in_tiles_of_the_same_size(vae: Any) -> None:
    latents = torch.randn(1, 4, 64, 48)
    with memory_for(vae.decoder, 20) as sides:
        found = decoding.decode(vae, latents)
    assert sides[:2] == [64, 32]
    assert max(sides[2:]) == 16
    assert found.shape == (1, 3, 512, 384)
    assert torch.isfinite(found).all()
    assert not vae.use_tiling


@torch.inference_mode()
def test_a_fast_form_that_does_not_fit_is_asked_for_no_tiles(vae: Any) -> None:
    latents, fast_vae = torch.randn(1, 4, 40, 24), copy.deepcopy(vae)
    with memory_for(fast_vae.decoder, 20) as sides, memory_for(vae.decoder, 20) as plain_sides:
        found = decoding.decode(vae, latents, fast_vae)
    assert sides == [40]
    assert plain_sides[:2] == [40, 20]
    assert found.shape == (1, 3, 320, 192)


@torch.inference_mode()
def test_a_picture_is_encoded_in_tiles_too(vae: Any) -> None:
    pictures = torch.rand(1, 3, 256, 320) * 2 - 1
    with memory_for(vae.encoder, 200) as sides:
        found = decoding.encode(vae, pictures)
    assert max(sides[1:]) <= 160
    assert found.shape == (1, 4, 32, 40)


@torch.inference_mode()
def test_where_not_even_a_tile_fits_it_is_the_memory_that_is_named(vae: Any) -> None:
    with memory_for(vae.decoder, 8), pytest.raises(torch.OutOfMemoryError):
        decoding.decode(vae, torch.randn(1, 4, 32, 32))
    assert not vae.use_tiling
