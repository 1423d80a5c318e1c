"""UNet calls that are captured and repeated: which are, in how many rows, and what comes out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_worker import devices
from gpu_worker.engine.denoise import called
from gpu_worker.engine.graphs import BUCKETS, Graphs, bucket, shape_of
from gpu_worker.models import weights
from tests.gpu_worker.conftest import as_cached


class Recorder(devices.Cpu):
    """A CPU that captures a call as a GPU does: it is done again on the same places, and its result lands in one."""

    can_capture = True

    def __init__(self) -> None:
        self.num_captured = 0
        self.free: int | None = None
        self.failure: Exception | None = None

    def free_bytes(self) -> int | None:
        return self.free

    def pool(self) -> Any:
        return object()

    def capture(self, call: Callable[[], torch.Tensor], pool: Any) -> tuple[Callable[[], None], torch.Tensor]:
        if self.failure is not None:
            raise self.failure
        self.num_captured += 1
        output = call()
        return lambda: output.copy_(call()), output


@pytest.fixture(scope="module")
def models(tiny_checkpoint: Path) -> weights.Models:
    return weights.load(as_cached(tiny_checkpoint), None, "cpu")


class Called:
    """A UNet that counts its calls."""

    def __init__(self, models: weights.Models) -> None:
        self.models = models
        self.num_rows: list[int] = []

    def __call__(self, *inputs: Any) -> torch.Tensor:
        self.num_rows.append(len(inputs[0]))
        return called(self.models.unet, *inputs)


def inputs(num_rows: int, seed: int = 0, size: int = 8, num_chunks: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, 4, size, size, generator=generator)
    timestep = torch.rand(num_rows, generator=generator) * 1000
    return x, timestep, torch.randn(num_rows, 77 * num_chunks, 32, generator=generator), {}


@torch.inference_mode()
def test_a_repeated_call_gives_what_the_unet_gives(models: weights.Models) -> None:
    unet, device = Called(models), Recorder()
    graphs = Graphs(unet, device, 1.0)
    for seed in range(4):
        for num_rows in (5, 2, 6):
            given = inputs(num_rows, seed)
            torch.testing.assert_close(graphs(*given), called(models.unet, *given), rtol=1e-4, atol=1e-5)
    assert device.num_captured == len(graphs) == 2  # of 2 and of 6 rows


@torch.inference_mode()
def test_a_result_is_not_overwritten_by_the_next_call(models: weights.Models) -> None:
    graphs = Graphs(Called(models), Recorder(), 1.0)
    for _ in range(2):
        graphs(*inputs(2))
    first = graphs(*inputs(2, seed=1))
    before = first.clone()
    graphs(*inputs(2, seed=2))
    assert torch.equal(first, before)


@torch.inference_mode()
def test_a_shape_is_captured_when_it_comes_again(models: weights.Models) -> None:
    unet, device = Called(models), Recorder()
    graphs = Graphs(unet, device, 1.0)
    for given in (inputs(2), inputs(2, size=16), inputs(2, num_chunks=2), inputs(4)):
        graphs(*given)
        assert device.num_captured == 0
    assert unet.num_rows == [2, 2, 2, 4]
    graphs(*inputs(3))  # another shape than that of 4
    assert device.num_captured == 0
    graphs(*inputs(2, num_chunks=2))
    assert device.num_captured == 1


@torch.inference_mode()
def test_what_cannot_be_captured_is_called_as_it_is(models: weights.Models) -> None:
    for failure in (RuntimeError("CUDA error: operation not permitted"), torch.OutOfMemoryError()):
        unet, device = Called(models), Recorder()
        device.failure = failure
        graphs = Graphs(unet, device, 1.0)
        for _ in range(4):
            graphs(*inputs(3))
        assert unet.num_rows == [3] * 4
        assert len(graphs) == 0


@torch.inference_mode()
def test_nothing_is_captured_where_memory_is_short(models: weights.Models) -> None:
    device = Recorder()
    device.free = 2 * 64 * 64 * 2
    graphs = Graphs(Called(models), device, bytes_per_pixel=1.0)
    for _ in range(3):
        graphs(*inputs(2))
    assert len(graphs) == 0


@torch.inference_mode()
def test_a_shape_for_which_memory_was_short_is_captured_later(
    models: weights.Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_worker.engine.graphs._TRIED_AGAIN_AFTER", 4)
    device = Recorder()
    device.free = 2 * 64 * 64 * 2
    graphs = Graphs(Called(models), device, bytes_per_pixel=1.0)
    for _ in range(4):
        graphs(*inputs(2))
    device.free = None
    graphs(*inputs(2))
    assert len(graphs) == 0
    graphs(*inputs(2))
    assert len(graphs) == 1


@torch.inference_mode()
def test_graphs_are_given_up_when_memory_is_needed_and_made_again(models: weights.Models) -> None:
    device = Recorder()
    graphs = Graphs(Called(models), device, 1.0)
    for _ in range(2):
        graphs(*inputs(2))
    assert len(graphs) == 1
    devices.make_memory()
    assert len(graphs) == 0
    for _ in range(2):
        graphs(*inputs(2))
    assert len(graphs) == 1


@torch.inference_mode()
def test_calls_of_two_rows_and_more_are_captured_from_a_form_that_is_ready_for_their_shape(
    models: weights.Models,
) -> None:
    plain, other = Called(models), Called(models)
    graphs = Graphs(plain, Recorder(), 1.0)
    x, _, text, _ = inputs(2)
    graphs.prepared(other, {shape_of(x, text)})
    for _ in range(3):
        for num_rows in (1, 2, 4):
            graphs(*inputs(num_rows))
        graphs(*inputs(2, size=16))
    assert set(other.num_rows) == {2, 4}
    assert plain.num_rows.count(4) == 1  # before it was captured
    assert plain.num_rows.count(1) > 1
    assert len(graphs) == 4


def test_padding_adds_less_than_a_third() -> None:
    for num_rows in range(4, max(BUCKETS) + 1):
        assert num_rows <= bucket(num_rows) < num_rows * 4 / 3
    assert bucket(1000) == 1000
