"""The UNet's fast form: the same weights, the same results but for its rounding."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from gpu_worker.engine import fast
from gpu_worker.engine.denoise import called
from gpu_worker.models import tiny, weights
from tests.gpu_worker.conftest import as_cached
from tests.gpu_worker.engine.test_graphs import inputs


@pytest.fixture(scope="module")
def models(tiny_checkpoint: Path) -> weights.Models:
    return weights.load(as_cached(tiny_checkpoint), None, "cpu", torch.bfloat16)


def in_bf16(num_rows: int, size: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    x, timestep, text, added = inputs(num_rows, size=size)
    return x.bfloat16(), timestep, text.bfloat16(), added


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@torch.inference_mode()
def test_it_shares_the_weights_and_leaves_the_unet_as_it_was(models: weights.Models) -> None:
    expected = called(models.unet, *in_bf16(2))
    twin = fast.made(models.unet, is_compiled=False, is_fp8=True)
    own = {id(parameter) for parameter in models.unet.parameters()}
    assert {id(parameter) for parameter in twin.parameters()} <= own
    assert not any(isinstance(module, fast.Fp8Linear) for module in models.unet.modules())
    assert torch.equal(called(models.unet, *in_bf16(2)), expected)


@torch.inference_mode()
def test_a_layer_in_fp8_is_within_the_rounding_of_its_numbers() -> None:
    """Three bits of mantissa: each factor is within 1/16, and their errors are independent."""
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(640, 320).bfloat16()
    x = torch.randn(2, 64, 640, generator=generator).bfloat16() * torch.tensor([0.01, 100]).bfloat16()[:, None, None]
    for row in range(2):
        assert error(fast.Fp8Linear(layer)(x)[row].float(), layer(x)[row].float()) < 0.05


@torch.inference_mode()
def test_rows_in_fp8_do_not_depend_on_their_company() -> None:
    layer = fast.Fp8Linear(torch.nn.Linear(64, 32).bfloat16())
    x = torch.randn(4, 64).bfloat16()
    x[1] *= 1000
    assert torch.equal(layer(x)[0], layer(x[:1])[0])


@torch.inference_mode()
def test_a_unet_in_fp8_predicts_about_the_same(models: weights.Models) -> None:
    twin = fast.made(models.unet, is_compiled=False, is_fp8=True)
    layers = [module for module in twin.modules() if isinstance(module, fast.Fp8Linear)]
    assert len(layers) == 10 * 8  # of the 10 in a block, but for the two that read the text
    assert error(called(twin, *in_bf16(2)).float(), called(models.unet, *in_bf16(2)).float()) < 0.05


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"
)  # what compiles uses it
@torch.inference_mode()
def test_the_compiled_form_predicts_the_same() -> None:
    # One level of the four: g++ takes seconds for each piece of each shape.
    level = {
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
        "block_out_channels": [16],
    }
    unet = UNet2DConditionModel(**tiny.config()["unet"] | level).eval()
    twin = fast.made(unet, is_compiled=True, is_fp8=False)
    for num_rows in (2, 4):
        given = inputs(num_rows)
        assert error(called(twin, *given), called(unet, *given)) < 1e-5
