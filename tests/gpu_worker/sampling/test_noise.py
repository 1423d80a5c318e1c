"""The noise that a picture begins with: seeds, variations, other sizes, and that of a GPU."""

import itertools
import math

import pytest
import torch

from gpu_worker.sampling import noise
from gpu_worker.sampling.philox import Philox
from services.common.payloads import Generation
from tests.gpu_worker.driving import changed, txt2img_of

REQUEST = txt2img_of(width=64, height=96, seed=3, subseed=9)


def drawn(request: Generation, image: int = 0) -> torch.Tensor:
    return noise.first(request, [image], noise.generators(request, [image]))[0]


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_each_image_has_the_noise_of_its_seed() -> None:
    assert torch.equal(drawn(REQUEST), randn(3, 4, 12, 8))
    assert torch.equal(drawn(REQUEST, image=2), randn(5, 4, 12, 8))


def test_a_variation_goes_from_the_seed_to_the_subseed_and_keeps_its_length() -> None:
    low, high = randn(3, 4, 12, 8), randn(9, 4, 12, 8)
    near = drawn(changed(REQUEST, subseed_strength=1e-4))
    assert torch.allclose(near, low, atol=1e-2)
    assert torch.allclose(drawn(changed(REQUEST, subseed_strength=1.0)), high, atol=1e-4)
    middle = drawn(changed(REQUEST, subseed_strength=0.5))
    # Column by column, as A1111's slerp has it (Shoemake 1985).
    expected = torch.empty_like(low)
    cosine = (low / low.norm(dim=1, keepdim=True) * (high / high.norm(dim=1, keepdim=True))).sum(1)
    for channel, column in itertools.product(range(low.shape[0]), range(low.shape[2])):
        angle = math.acos(cosine[channel, column])
        share = math.sin(angle / 2) / math.sin(angle)
        expected[channel, :, column] = share * (low[channel, :, column] + high[channel, :, column])
    assert torch.allclose(middle, expected, atol=1e-5)


def test_variations_share_the_seed_and_differ_in_the_subseed() -> None:
    request = changed(REQUEST, subseed_strength=0.3)
    assert [request.seed_of(image) for image in range(3)] == [3, 3, 3]
    assert [request.subseed_of(image) for image in range(3)] == [9, 10, 11]
    assert not torch.equal(drawn(request), drawn(request, image=1))


def test_a_larger_picture_has_the_noise_of_the_smaller_one_in_its_middle_and_the_reverse() -> None:
    small = randn(3, 4, 4, 16)  # lower and wider than the picture
    found = drawn(changed(REQUEST, seed_resize_from_h=32, seed_resize_from_w=128))
    assert torch.equal(found[:, 4:8, :], small[:, :, 4:12])
    own = randn(3, 4, 12, 8)
    assert torch.equal(found[:, :4], own[:, :4])
    assert torch.equal(found[:, 8:], own[:, 8:])


def test_a_resize_from_the_same_size_or_from_half_a_size_changes_nothing() -> None:
    for width, height in ((64, 96), (-1, 32), (32, 0)):
        assert torch.equal(drawn(changed(REQUEST, seed_resize_from_w=width, seed_resize_from_h=height)), drawn(REQUEST))


def test_the_noise_of_a_gpu_is_what_pytorch_draws_there() -> None:
    """As everybody sees it: torch.manual_seed(0); torch.randn(3, 4, device="cuda")."""
    expected = [[-0.9247, -0.4253, -2.6438, 0.1452], [-0.1209, -0.5797, -0.6229, -0.3284]]
    expected += [[-1.0745, -0.3631, -1.6711, 2.2655]]
    assert torch.allclose(Philox(0).randn((3, 4)), torch.tensor(expected), atol=1e-4)


def test_draws_follow_each_other_and_seeds_may_have_64_bits() -> None:
    generator = Philox(5)
    draws = torch.stack([generator.randn((4096,)) for _ in range(3)] + [Philox(5 + 2**32).randn((4096,))])
    assert (torch.corrcoef(draws) - torch.eye(4)).abs().max() < 0.07
    assert draws.mean().abs() < 0.04
    assert draws.std() == pytest.approx(1, abs=0.03)
    generator.manual_seed(5)
    assert torch.equal(generator.randn((4096,)), draws[0])


@pytest.mark.parametrize("source", ["GPU", "NV"])
def test_all_noise_is_of_the_source_that_is_asked_for(source: str) -> None:
    request = changed(REQUEST, noise_source=source)
    rows = noise.generators(request, [0, 1])
    assert torch.equal(
        noise.first(request, [0, 1], rows), torch.stack([Philox(seed).randn((4, 12, 8)) for seed in (3, 4)])
    )
    later = Philox(4)
    later.randn((4, 12, 8))
    assert torch.equal(noise.normal((1, 4, 12, 8), rows[1])[0], later.randn((4, 12, 8)))
    noise.reseed(changed(request, noise_seed_delta=7), [0, 1], rows)
    assert torch.equal(noise.normal((6,), rows[0]), Philox(10).randn((6,)))
    varied = drawn(changed(request, subseed_strength=1.0))
    assert torch.allclose(varied, Philox(9).randn((4, 12, 8)), atol=1e-4)
    resized = drawn(changed(request, seed_resize_from_h=32, seed_resize_from_w=128))
    assert torch.equal(resized[:, 4:8, :], Philox(3).randn((4, 4, 16))[:, :, 4:12])
