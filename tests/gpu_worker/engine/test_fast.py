"""Fast forms of UNet and decoder: the same weights, the same results but for their rounding."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from structlog.testing import capture_logs

from gpu_worker import tasks
from gpu_worker.engine import fast
from gpu_worker.engine.decoding import Decoded
from gpu_worker.engine.denoise import called
from gpu_worker.engine.placed import Placed
from gpu_worker.engine.run import Equipment
from gpu_worker.engine.settings import EngineSettings
from gpu_worker.models import tiny, weights
from tests.gpu_worker.conftest import as_cached
from tests.gpu_worker.driving import txt2img_of
from tests.gpu_worker.engine.test_graphs import Recorder, inputs


@pytest.fixture(scope="module")
def models(tiny_checkpoint: Path) -> weights.Models:
    return weights.load(as_cached(tiny_checkpoint), None, "cpu", torch.bfloat16)


def in_bf16(num_rows: int, size: int = 16, num_chunks: int = 1) -> Any:
    x, timestep, text, added = inputs(num_rows, size=size, num_chunks=num_chunks)
    return x.bfloat16(), timestep, text.bfloat16(), added


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@torch.inference_mode()
def test_it_shares_the_weights_and_leaves_the_unet_as_it_was(models: weights.Models) -> None:
    expected = called(models.unet, *in_bf16(2))
    twin = fast.unet_of(models.unet, is_compiled=False, is_fp8=True)
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
    twin = fast.unet_of(models.unet, is_compiled=False, is_fp8=True)
    layers = [module for module in twin.modules() if isinstance(module, fast.Fp8Linear)]
    assert len(layers) == 10 * 5  # of the 10 in a block, those that read a layer norm
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
    twin = fast.unet_of(unet, is_compiled=True, is_fp8=False)
    num_compiled = []
    for num_rows in (2, 4, 3):
        given = inputs(num_rows)
        assert error(called(twin, *given), called(unet, *given)) < 1e-5
        num_compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert num_compiled == num_compiled[:1] * 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@torch.inference_mode()
def test_the_compiled_decoder_makes_the_same_picture() -> None:
    config = tiny.config()["vae"] | {"block_out_channels": [8, 8], "norm_num_groups": 4}
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = AutoencoderKL(**config | kinds).eval()
    latents = torch.randn(1, 4, 8, 8)
    expected = vae.decode(latents).sample
    assert error(fast.vae_of(vae).decode(latents).sample, expected) < 1e-5
    assert torch.equal(vae.decode(latents).sample, expected)


@torch.inference_mode()
def test_a_checkpoint_on_its_device_has_fast_forms_for_its_own_size_and_usual_prompts(
    models: weights.Models, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast, "compiled", lambda network: network)  # takes minutes on a CPU, and is tested above
    placed = Placed(models, Recorder(), EngineSettings(compiled=True, fp8=True))
    placed.enter()
    placed.settle()
    size = models.unet.config.sample_size
    native, other = torch.randn(1, 4, size, size), torch.randn(1, 4, size, 2 * size)
    assert placed.models.fast_vae_for(native) is placed.models.fast_vae is not None
    assert placed.models.fast_vae_for(other) is None
    equipment = Equipment(as_cached(tiny_checkpoint), None, [], placed)
    for changes, fast_vae in (
        ({}, placed.models.fast_vae),
        ({"exclusive": True}, None),
        ({"tiling": True}, None),
    ):
        crew = tasks._crew(txt2img_of(prompt="a red circle", **changes), [equipment])
        assert crew.last.fast_vae_for(native) is fast_vae
    pixels = Decoded(models.vae, native, placed.models.fast_vae).pixels()
    assert np.abs(pixels.astype(int) - Decoded(models.vae, native).pixels()).max() <= 1

    assert placed.graphs is not None
    for num_chunks in (1, 2, 3, 6):
        given = in_bf16(2, size, num_chunks)
        plain = called(models.unet, *given)
        assert torch.equal(placed.graphs(*given), plain)
        fast_ones = placed.graphs(*given)  # captured
        assert not torch.equal(fast_ones, plain)
        assert error(fast_ones.float(), plain.float()) < 0.05

    placed.leave()
    assert placed.models.fast_vae is None


@torch.inference_mode()
def test_a_checkpoint_that_cannot_be_compiled_is_used_as_it_is(
    models: weights.Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(network: Any) -> Any:
        raise RuntimeError("no compiler was found")

    monkeypatch.setattr(fast, "compiled", fail)
    placed = Placed(models, Recorder(), EngineSettings(compiled=True))
    with capture_logs() as logs:
        placed.enter()
    placed.settle()
    assert "no compiler was found" in [entry.get("reason") for entry in logs]
    assert placed.models.fast_vae is None
    assert placed.graphs is not None
    given = in_bf16(2)
    for _ in range(2):
        assert torch.equal(placed.graphs(*given), called(models.unet, *given))
