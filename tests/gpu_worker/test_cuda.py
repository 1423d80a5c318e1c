"""The engine on a GPU, where the machine has one: the same latents, graphs, memory, moves.

Needs none of the other tests' parts, so that it runs where only torch and the worker's packages are:

    python -m pytest -c /dev/null --rootdir=. --noconftest tests/gpu_worker/test_cuda.py
"""

import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from gpu_worker import devices
from gpu_worker.audience import Audience
from gpu_worker.engine.core import Core
from gpu_worker.engine.denoise import called
from gpu_worker.engine.graphs import BUCKETS, Graphs
from gpu_worker.engine.placed import Placed
from gpu_worker.engine.run import Produced, Run
from gpu_worker.engine.settings import EngineSettings
from gpu_worker.files.cache import CachedModel
from gpu_worker.models import tiny, weights
from gpu_worker.sampling.philox import Philox
from gpu_worker.tasks import txt2img
from services.common.payloads import Generation, samplers
from tests.gpu_worker.driving import changed, txt2img_of
from tests.gpu_worker.reference import pipeline_latents, pipeline_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device on this machine"),
    pytest.mark.filterwarnings("ignore"),
]

REQUEST = txt2img_of(prompt="a red circle", negative_prompt="blurry", steps=6, width=128, height=128, seed=3)
NAMES = samplers.names()
COMPANY = 6
# Relative, of latents in fp32: sums in another order.
BOUND = 5e-5


class Driven:
    """A core on this thread, and the final latents of its jobs."""

    def __init__(self, settings: EngineSettings) -> None:
        self.loaded = threading.Semaphore(0)
        self.core = Core(devices.of("cuda"), settings, self.loaded.release)
        self.outcomes: dict[int, Any] = {}
        self.latents: dict[int, torch.Tensor] = {}
        self._denoised = txt2img.denoised

    def start(self, request: Generation, file: CachedModel, **options: Any) -> Run:
        """Adds a job."""
        self.outcomes[id(request)] = None

        def end(outcome: Any) -> None:
            self.outcomes[id(request)] = outcome

        run = Run("job", request, [file], lambda: None, lambda _: None, end, **options)
        self.core.add(run)
        return run

    def until(self, condition: Callable[[], Any]) -> None:
        """Works until it is so."""
        with mock.patch.object(txt2img, "denoised", self._recorded):
            for _ in range(100_000):
                if condition():
                    return
                if self.core.is_idle:
                    self.loaded.acquire(timeout=0.1)
                self.core.work()
        raise AssertionError("it did not come to that")

    def run(self, requests: list[Generation], file: CachedModel) -> list[Produced]:
        """Jobs at once, to their ends."""
        for request in requests:
            self.start(request, file)
        self.until(lambda: all(self.outcomes[id(request)] is not None for request in requests))
        found = [self.outcomes[id(request)] for request in requests]
        assert all(isinstance(outcome, Produced) for outcome in found), found
        return found

    def latents_of(self, requests: list[Generation], file: CachedModel) -> list[torch.Tensor]:
        """The final latents of jobs at once."""
        self.run(requests, file)
        return [self.latents[id(request)] for request in requests]

    @property
    def placed(self) -> Placed:
        """The checkpoint on the device."""
        return self.core.here[0]

    def _recorded(self, request: Any, *arguments: Any) -> Generator[Any, Any, torch.Tensor]:
        latents = yield from self._denoised(request, *arguments)
        self.latents[id(request)] = latents.clone()
        return latents


@pytest.fixture(scope="module", autouse=True)
def exact_float32() -> Iterator[None]:
    """Convolutions of fp32 are not rounded to TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[CachedModel]:
    folder = tmp_path_factory.mktemp("checkpoints")
    found = []
    for seed in range(3):
        path = folder / f"{seed}.safetensors"
        tiny.write(path, seed)
        found.append(CachedModel(str(path), "Stable-diffusion", path.name, path, ""))
    return found


@pytest.fixture(scope="module")
def driven() -> Iterator[Driven]:
    found = Driven(EngineSettings(precision="float32"))
    yield found
    found.core.close()


@pytest.fixture(scope="module")
def pipeline(files: list[CachedModel], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return pipeline_of(files[0].path, weights.tokenizer("<|endoftext|>"), tmp_path_factory.mktemp("config")).to("cuda")


@pytest.fixture
def models(driven: Driven, files: list[CachedModel]) -> weights.Models:
    driven.run([changed(REQUEST, steps=1)], files[0])
    return driven.placed.models


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_a_job_alone_has_the_latents_of_the_diffusers_pipeline(
    driven: Driven, pipeline: Any, files: list[CachedModel], name: str
) -> None:
    request = changed(REQUEST, sampler_name=name)
    assert error(driven.latents_of([request], files[0])[0], pipeline_latents(pipeline, name, request)) < BOUND


@pytest.mark.parametrize("first", range(0, len(NAMES), COMPANY))
def test_a_job_among_five_others_has_the_latents_that_it_has_alone(
    driven: Driven, files: list[CachedModel], first: int
) -> None:
    names = [NAMES[(first + index) % len(NAMES)] for index in range(COMPANY)]
    requests = [
        changed(
            REQUEST,
            sampler_name=name,
            prompt=f"picture {index}",
            seed=index,
            steps=3 + 2 * index % 5,
            cfg_scale=(7.0, 1.0, 4.5, 0.0, 12.0, 2.0)[index],
            batch_size=1 + (index == 2),
        )
        for index, name in enumerate(names)
    ]
    alone = [driven.latents_of([request], files[0])[0] for request in requests]
    for found, expected in zip(driven.latents_of(requests, files[0]), alone, strict=True):
        assert error(found, expected) < BOUND


def test_pixels_are_those_of_the_cpu(files: list[CachedModel], driven: Driven) -> None:
    found = driven.run([REQUEST], files[0])[0].images[0].astype(int)
    loaded = threading.Semaphore(0)
    core = Core(devices.of("cpu"), EngineSettings(), loaded.release)
    outcomes: list[Any] = []
    core.add(Run("cpu", REQUEST, [files[0]], lambda: None, lambda _: None, outcomes.append))
    while not outcomes:
        if core.is_idle:
            loaded.acquire(timeout=0.1)
        core.work()
    core.close()
    assert np.abs(found - outcomes[0].images[0]).max() <= 3


def inputs(models: weights.Models, num_rows: int, seed: int) -> Any:
    generator = torch.Generator("cuda").manual_seed(seed)
    options: Any = {"device": "cuda", "generator": generator}
    width = models.unet.config.cross_attention_dim
    x = torch.randn(num_rows, 4, 16, 16, **options)
    return x, torch.rand(num_rows, **options) * 999, torch.randn(num_rows, 77, width, **options), {}


@pytest.mark.parametrize("side", [64, 128])
def test_the_noise_of_a_gpu_is_drawn_without_one(side: int) -> None:
    theirs, ours = torch.Generator("cuda").manual_seed(2**40 + 3), Philox(2**40 + 3)
    for _ in range(3):
        drawn = torch.randn(1, 4, side, side, device="cuda", generator=theirs)
        assert (ours.randn((1, 4, side, side)) - drawn.cpu()).abs().max() < 1e-5


@torch.inference_mode()
def test_graphs_give_what_the_unet_gives_in_any_number_of_rows_and_order(models: weights.Models) -> None:
    def forward(*given: Any) -> torch.Tensor:
        return called(models.unet, *given)

    graphs = Graphs(forward, devices.of("cuda"), 1.0)
    sizes = [1, 2, 3, 5, 8, 11, 16]
    for _ in range(2):
        for num_rows in sizes:
            graphs(*inputs(models, num_rows, 0))
    assert len(graphs) == len({next(rows for rows in BUCKETS if rows >= size) for size in sizes})
    before = torch.cuda.memory_reserved()
    for seed, num_rows in enumerate([*sizes, *reversed(sizes)] * 3):
        given = inputs(models, num_rows, seed)
        assert error(graphs(*given), forward(*given)) < BOUND
        assert torch.equal(graphs(*given), graphs(*given))
    assert torch.cuda.memory_reserved() <= before + 2**26
    graphs.clear()
    for _ in range(2):
        graphs(*inputs(models, 4, 1))
    assert len(graphs) == 1
    assert error(graphs(*inputs(models, 4, 2)), forward(*inputs(models, 4, 2))) < BOUND


@torch.inference_mode()
def test_a_call_that_cannot_be_captured_is_done_and_the_next_ones_are_right(models: weights.Models) -> None:
    def waiting(*given: Any) -> torch.Tensor:
        assert float(given[0].sum()) is not None  # waits for the GPU, which a capture forbids
        return called(models.unet, *given)

    stream = torch.cuda.current_stream()
    graphs = Graphs(waiting, devices.of("cuda"), 1.0)
    for seed in range(4):
        given = inputs(models, 2, seed)
        assert error(graphs(*given), called(models.unet, *given)) < BOUND
    assert len(graphs) == 0
    assert torch.cuda.current_stream() == stream
    torch.cuda.synchronize()


def test_ticks_go_through_graphs_and_their_thread_waits_for_nothing(driven: Driven, files: list[CachedModel]) -> None:
    names = ["Euler a", "DPM++ 2M Karras", "UniPC", "DPM++ SDE", "LMS", "PLMS"]
    requests = [changed(REQUEST, sampler_name=name, steps=8, seed=seed) for seed, name in enumerate(names)]
    driven.run(requests, files[0])
    evaluate, ticks = driven.core._evaluate, []

    def evaluated(runs: Any) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            evaluate(runs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        ticks.append(len(runs))

    graphs = driven.placed.graphs
    assert graphs is not None
    assert len(graphs) > 0
    again = [changed(request) for request in requests]
    with mock.patch.object(driven.core, "_evaluate", evaluated):
        driven.run(again, files[0])
    assert max(ticks) == len(names)


def test_an_exclusive_job_repeats_bit_for_bit_whatever_ran_before(driven: Driven, files: list[CachedModel]) -> None:
    company = [changed(REQUEST, seed=seed, steps=9) for seed in range(3)]
    found = []
    for _ in range(3):
        exclusive = changed(REQUEST, exclusive=True, sampler_name="Euler a", batch_size=2)
        found.append(driven.latents_of([*company, exclusive], files[0])[-1])
        devices.make_memory()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    alone = changed(REQUEST, exclusive=True, sampler_name="Euler a", seed=REQUEST.seed + 1)
    assert torch.equal(driven.latents_of([alone], files[0])[0], found[0][1:])


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_precision_makes_about_the_same_picture(files: list[CachedModel], driven: Driven, precision: str) -> None:
    expected = driven.run([REQUEST], files[0])[0].images[0].astype(int)
    other = Driven(EngineSettings(precision=precision))
    found = other.run([REQUEST], files[0])[0].images[0].astype(int)
    other.core.close()
    assert np.abs(found - expected).mean() < 4


def test_rows_that_do_not_fit_the_memory_are_halved_and_no_job_fails(files: list[CachedModel]) -> None:
    other = Driven(EngineSettings(precision="float32"))
    requests = [changed(REQUEST, width=768, height=768, batch_size=8, steps=3, seed=seed) for seed in range(4)]
    other.run([changed(REQUEST, width=768, height=768, steps=1)], files[0])
    before = other.placed.bound.pixels
    total = torch.cuda.get_device_properties().total_memory
    num_rows = other.placed.bound.max_rows(768 * 768)
    x, timestep, text, added = other.placed._inputs(num_rows)
    x = x.new_zeros(num_rows, 4, 96, 96)
    with torch.inference_mode():
        peak = other.core._device.peak_bytes(lambda: called(other.placed.models.unet, x, timestep, text, added))
    spare = peak / 3
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + spare) / total)
    try:
        produced = other.run(requests, files[0])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert all(np.stack(found.images).std() > 0 for found in produced)
    assert other.placed.bound.pixels < before
    other.core.close()


def test_checkpoints_move_and_memory_does_not_grow(files: list[CachedModel]) -> None:
    size = 12_000_000
    other = Driven(EngineSettings(precision="float16", model_bytes=size, copy_bytes=100 * size))
    requests = [changed(REQUEST, steps=3) for _ in range(3)]
    expected = [other.run([changed(REQUEST, steps=3)], file)[0].images[0].astype(int) for file in files]
    assert len(other.core.here) < 3
    assert len(other.core.warm_models) == 3
    for index in range(6):
        other.run([changed(requests[0])], files[index % 3])
    torch.cuda.synchronize()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for index in range(51):
        found = other.run([changed(requests[0])], files[index % 3])[0].images[0].astype(int)
        assert np.abs(found - expected[index % 3]).mean() < 1
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= allocated + 2**20
    assert torch.cuda.memory_reserved() <= reserved + 2**26
    other.core.close()


def test_models_load_while_others_tick(files: list[CachedModel]) -> None:
    other = Driven(EngineSettings(precision="float16"))
    long, second = changed(REQUEST, steps=150, n_iter=2), changed(REQUEST)
    other.start(long, files[0])
    other.until(lambda: other.core._batch)
    other.start(second, files[1])
    other.until(lambda: other.outcomes[id(second)] is not None)
    assert other.outcomes[id(long)] is None
    other.until(lambda: other.outcomes[id(long)] is not None)
    assert isinstance(other.outcomes[id(long)], Produced)
    other.core.close()


def test_a_cancelled_job_ends_within_a_step_and_is_shown_until_then(driven: Driven, files: list[CachedModel]) -> None:
    audience, shown = Audience(), []
    audience.is_watching = True
    request = changed(REQUEST, steps=150)
    run = driven.start(request, files[0], audience=audience, on_preview=shown.append)
    driven.until(lambda: shown)
    assert shown[0].startswith(b"\xff\xd8")
    driven.core.cancel(run, KeyboardInterrupt())
    assert isinstance(driven.outcomes[id(request)], KeyboardInterrupt)
    assert run.models is None
    driven.run([changed(REQUEST)], files[0])


def test_the_bound_follows_the_memory_that_is_free(driven: Driven, models: weights.Models) -> None:
    placed = driven.placed
    assert placed._bytes_per_pixel > 0
    free = devices.of("cuda").free_bytes()
    assert free is not None
    placed.allow(free)
    assert 512 * 512 <= placed.bound.pixels <= devices.Cuda.max_pixels
    placed.allow(int(4 * 512 * 512 * placed._bytes_per_pixel))
    assert placed.bound.max_rows(512 * 512) in {2, 3}
    placed.allow(free)
