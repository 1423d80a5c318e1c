"""The GPU thread's work, driven by hand: company, memory, cancelling, fairness between checkpoints."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpu_worker.devices import Cpu
from gpu_worker.engine.core import NO_MEMORY, Core
from gpu_worker.engine.run import Produced, Run
from gpu_worker.engine.settings import EngineSettings
from gpu_worker.files.cache import CachedModel
from gpu_worker.job import INTERNAL, JobError
from gpu_worker.models import tiny, weights
from services.common.payloads import Generation
from tests.gpu_worker import tiny_lora
from tests.gpu_worker.conftest import as_cached
from tests.gpu_worker.driving import changed, txt2img_of
from tests.gpu_worker.engine.test_graphs import Recorder
from tests.gpu_worker.tiny_sdxl import make

REQUEST = txt2img_of(prompt="a cat", negative_prompt="bad", steps=6, width=64, height=64, seed=3)


@dataclass(eq=False)
class Driven:
    """A core whose work a test does, and what its UNet calls looked like."""

    checkpoint: Path
    num_rows: list[int] = field(default_factory=list)
    max_pixels: int | None = None
    max_models: int = 2
    device: Cpu = field(default_factory=Cpu)

    def __post_init__(self) -> None:
        self.loaded = threading.Semaphore(0)
        model_bytes = int(self.max_models * 1.2 * self.checkpoint.stat().st_size * 2)  # fp16 in the file, fp32 here
        settings = EngineSettings(max_pixels=self.max_pixels, model_bytes=model_bytes)
        self.core = Core(self.device, settings, self.loaded.release)
        self.outcomes: dict[str, Any] = {}
        self.progress: dict[str, list[int]] = {}
        self.ended: list[str] = []
        # Called with the rows of a UNet call before it.
        self.before: Callable[[torch.Tensor], None] = lambda _: None

    def add(
        self,
        name: str,
        request: Generation,
        checkpoint: Path | None = None,
        *others: Path | CachedModel,
        is_urgent: bool = False,
    ) -> Run:
        steps = self.progress.setdefault(name, [])

        def end(outcome: Any) -> None:
            self.outcomes[name] = outcome
            self.ended.append(name)

        files = [
            as_cached(file) if isinstance(file, Path) else file for file in (checkpoint or self.checkpoint, *others)
        ]
        run = Run(name, request, files, lambda: None, steps.append, end, is_urgent=is_urgent)
        self.core.add(run)
        return run

    def work(self) -> None:
        """One round of the thread."""
        self.core.work()
        if self.core.is_idle and self.core._loader._waiting:  # for a load
            self.loaded.acquire(timeout=120)
            self.core.work()
        for placed in self.core.here:
            self._watch(placed.models.unet)

    def _watch(self, unet: Any) -> None:
        if not hasattr(unet, "is_watched"):
            unet.is_watched = True

            def before(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
                self.num_rows.append(len(arguments[0]))
                self.before(arguments[0])

            unet.register_forward_pre_hook(before)

    def until(self, condition: Callable[[], Any]) -> None:
        for _ in range(2000):
            if condition():
                return
            self.work()
        raise AssertionError("it did not come to that")

    def until_ended(self, *names: str) -> None:
        self.until(lambda: all(name in self.outcomes for name in names))

    def pixels(self, name: str) -> np.ndarray:
        outcome = self.outcomes[name]
        assert isinstance(outcome, Produced), outcome
        return np.stack(outcome.images).astype(int)


class Gauge(Cpu):
    """A CPU with so much free memory, on which two rows of the tiny model's own size take 100 bytes a pixel."""

    def __init__(self, free: int) -> None:
        self.free = free

    def free_bytes(self) -> int | None:
        return self.free

    def peak_bytes(self, call: Callable[[], object]) -> int:
        call()
        return 2 * 64 * 64 * 100


class Ahead(Cpu):
    """A device with a clock of its own, which goes on by so many seconds with what `takes` is told of. The thread is a
    tick ahead of it."""

    ticks_ahead = 1

    def __init__(self) -> None:
        self.now = 0.0

    def mark(self) -> float:
        return self.now

    def takes(self, module: torch.nn.Module, seconds: float) -> None:
        def before(*_: Any) -> None:
            self.now += seconds

        module.register_forward_pre_hook(before)


@pytest.fixture
def driven(tiny_checkpoint: Path) -> Iterator[Driven]:
    found = Driven(tiny_checkpoint)
    yield found
    found.core.close()


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("others")
    paths = [folder / f"{seed}.safetensors" for seed in (2, 3)]
    for seed, path in enumerate(paths):
        tiny.write(path, seed=seed + 2)
    return paths


def test_jobs_that_come_while_others_run_share_their_ticks_and_leave_with_the_same_pictures(driven: Driven) -> None:
    requests = {str(seed): changed(REQUEST, seed=seed, steps=3 + seed, n_iter=1 + seed % 2) for seed in range(5)}
    for name, request in requests.items():
        driven.add(f"alone {name}", request)
        driven.until_ended(f"alone {name}")
    alone_calls = len(driven.num_rows)
    driven.num_rows.clear()
    for name, request in requests.items():
        driven.add(name, request)
        driven.work()
        driven.work()
    driven.until_ended(*requests)
    assert len(driven.num_rows) < 0.7 * alone_calls
    assert max(driven.num_rows) > 4
    for name, request in requests.items():
        assert np.abs(driven.pixels(name) - driven.pixels(f"alone {name}")).max() <= 1
        assert driven.progress[name] == driven.progress[f"alone {name}"]
        assert driven.progress[name][-1] == request.steps * request.num_images


@pytest.fixture
def ahead(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driven]:
    """With a job behind it, so that the models are here; a tick takes an hour of its device, a text nothing, a picture
    40 minutes. Those who come together are waited for, however slow the machine is."""
    monkeypatch.setattr("gpu_worker.engine.core._GATHERING_SECONDS", 600.0)
    device = Ahead()
    found = Driven(tiny_checkpoint, device=device)
    found.add("first", REQUEST)
    found.until_ended("first")
    models = found.core.here[0].models
    device.takes(models.unet, 3600)
    device.takes(models.vae.decoder, 2400)
    found.num_rows.clear()
    yield found
    found.core.close()


def test_jobs_that_come_at_once_tick_together_from_the_first_step_on(ahead: Driven) -> None:
    names = [str(seed) for seed in range(8)]
    for name in names:
        ahead.add(name, changed(REQUEST, seed=int(name), steps=20))
    ahead.until_ended(*names)
    assert ahead.num_rows == [16] * 20


@pytest.mark.slow
def test_jobs_that_come_while_one_runs_join_it_as_soon_as_a_tick_allows(ahead: Driven) -> None:
    ahead.add("running", changed(REQUEST, steps=20))
    ahead.until(lambda: len(ahead.progress["running"]) == 3)
    for name in map(str, range(7)):
        ahead.add(name, changed(REQUEST, seed=int(name), steps=20))
    ahead.until_ended("running", *map(str, range(7)))
    assert ahead.num_rows[:5] == [2, 2, 2, 2, 16]
    assert len(ahead.num_rows) == 24


def test_a_first_call_waits_for_no_more_than_it_has_room_for(ahead: Driven, tiny_checkpoint: Path) -> None:
    ahead.core.here[0].bound.allow(6 * 64 * 64)
    for name in map(str, range(8)):
        ahead.add(name, changed(REQUEST, seed=int(name)))
    ahead.core.work()
    assert ahead.num_rows == [6]
    assert len(ahead.core._stages) > 0


def test_a_first_call_waits_no_longer_than_its_bound(ahead: Driven, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_worker.engine.core._GATHERING_SECONDS", 0.0)
    for name in map(str, range(8)):
        ahead.add(name, changed(REQUEST, seed=int(name)))
    ahead.core.work()
    assert len(ahead.core._batch) == 1


@pytest.mark.slow
def test_pictures_of_others_hold_up_a_job_for_about_a_tick(ahead: Driven) -> None:
    """A decoding is asked for in no time; what counts is the device's."""
    decoded: list[int] = []
    decoder = ahead.core.here[0].models.vae.decoder
    decoder.register_forward_pre_hook(lambda *_: decoded.append(len(ahead.num_rows)))
    ahead.add("pictures", changed(REQUEST, steps=2))
    ahead.add("long", changed(REQUEST, steps=60))
    ahead.until_ended("pictures")  # what a picture takes is known some ticks later
    ahead.until(lambda: len(ahead.progress["long"]) == 10)
    decoded.clear()
    for name in map(str, range(6)):
        ahead.add(name, changed(REQUEST, seed=int(name), steps=4))
    ahead.until_ended(*map(str, range(6)))
    assert len(decoded) == 6
    assert max(decoded.count(tick) for tick in decoded) <= 2
    ahead.until_ended("long")


def test_an_exclusive_job_shares_no_call_and_repeats_bit_for_bit(driven: Driven) -> None:
    for name in ("one", "two"):
        driven.add(f"company of {name}", changed(REQUEST, seed=9, steps=9))
        driven.add(name, changed(REQUEST, exclusive=True))
        driven.until_ended(name, f"company of {name}")
    assert set(driven.num_rows) == {2}
    assert np.array_equal(driven.pixels("one"), driven.pixels("two"))


def test_an_image_of_an_exclusive_batch_is_bit_for_bit_that_of_its_own_job(driven: Driven) -> None:
    driven.add("batch", changed(REQUEST, exclusive=True, batch_size=3))
    driven.add("second", changed(REQUEST, exclusive=True, seed=REQUEST.seed + 1))
    driven.until_ended("batch", "second")
    assert np.array_equal(driven.pixels("batch")[1:2], driven.pixels("second"))


@pytest.mark.slow
def test_an_exclusive_job_with_other_models_repeats_bit_for_bit_in_every_picture(
    driven: Driven, others: list[Path], tmp_path: Path
) -> None:
    """A LoRA, a refiner and another VAE."""
    style = tmp_path / "style.safetensors"
    tiny_lora.write(style)
    files = [others[0], as_cached(others[1], "VAE"), as_cached(style, "Lora")]
    changes = {"prompt": "a cat <lora:style:0.8>", "refiner_checkpoint": others[0].stem, "refiner_switch_at": 0.5}
    request = changed(REQUEST, **changes, steps=4, batch_size=2, n_iter=2)
    for name in ("one", "two"):
        driven.add(f"company of {name}", changed(request, seed=len(driven.ended)), None, *files)
        driven.add(name, changed(request, exclusive=True), None, *files)
        driven.until_ended(name, f"company of {name}")
    assert np.array_equal(driven.pixels("one"), driven.pixels("two"))
    for index in range(4):
        assert np.abs(driven.pixels("one")[index] - driven.pixels("one")[index - 1]).max() > 1
    driven.add("plain", changed(REQUEST, exclusive=True, steps=4))
    driven.until_ended("plain")
    assert np.abs(driven.pixels("one")[0] - driven.pixels("plain")[0]).max() > 1


def test_a_cancelled_job_has_no_further_call_and_its_company_goes_on(driven: Driven) -> None:
    run = driven.add("gone", changed(REQUEST, steps=150))
    driven.add("stays", changed(REQUEST, steps=30))
    driven.until(lambda: driven.num_rows and driven.num_rows[-1] == 4)
    driven.core.cancel(run, KeyboardInterrupt())
    driven.core.cancel(run, KeyboardInterrupt())
    assert isinstance(driven.outcomes["gone"], KeyboardInterrupt)
    driven.num_rows.clear()
    driven.until_ended("stays")
    assert set(driven.num_rows) == {2}
    assert run.models is None
    assert driven.ended == ["gone", "stays"]


def test_a_call_that_does_not_fit_the_memory_is_halved_and_no_job_fails(driven: Driven) -> None:
    def before(rows: torch.Tensor) -> None:
        if len(rows) > 2:
            raise torch.OutOfMemoryError

    driven.add("first", REQUEST)
    driven.until_ended("first")
    driven.before = before
    for index in range(3):
        driven.add(str(index), REQUEST)
    driven.add("batch", changed(REQUEST, batch_size=3))
    driven.until_ended("0", "1", "2", "batch")
    assert driven.core.max_pixels <= 2 * 64 * 64
    for name in ("0", "1", "2"):
        assert np.abs(driven.pixels(name) - driven.pixels("first")).max() <= 1
    assert np.abs(driven.pixels("batch")[:1] - driven.pixels("first")).max() <= 1


@pytest.mark.slow
def test_after_memory_was_short_calls_grow_again(driven: Driven) -> None:
    memory = [2]

    def before(rows: torch.Tensor) -> None:
        if len(rows) > memory[0]:
            raise torch.OutOfMemoryError

    driven.before = before
    for index in range(2):
        driven.add(str(index), changed(REQUEST, steps=60, seed=index))
    driven.until(lambda: driven.core.max_pixels == 2 * 64 * 64)
    memory[0] = 4
    driven.until_ended("0", "1")
    assert driven.core.max_pixels > 2 * 64 * 64


@pytest.mark.slow
def test_rows_of_a_call_are_bounded_by_the_memory_that_is_free_after_the_load(
    tiny_checkpoint: Path, others: list[Path]
) -> None:
    gauge = Gauge(free=1000 * 64 * 64)
    driven = Driven(tiny_checkpoint, device=gauge)
    for index in range(6):
        driven.add(str(index), changed(REQUEST, seed=index))
    driven.until_ended(*map(str, range(6)))
    assert max(driven.num_rows) == 8  # a pixel takes 100 bytes, and a fifth of the memory stays free
    gauge.free = 500 * 64 * 64
    driven.add("other", REQUEST, others[0])
    driven.until_ended("other")
    driven.num_rows.clear()
    for index in range(6):
        driven.add(f"again {index}", changed(REQUEST, seed=index))
    driven.until_ended(*(f"again {index}" for index in range(6)))
    assert max(driven.num_rows) == 4
    driven.core.close()


def test_calls_that_are_captured_make_the_same_pictures(driven: Driven, tiny_checkpoint: Path) -> None:
    recorder = Recorder()
    captured = Driven(tiny_checkpoint, device=recorder)
    requests = {str(seed): changed(REQUEST, seed=seed, steps=4 + seed) for seed in range(4)}
    for each in (driven, captured):
        for name, request in requests.items():
            each.add(name, request)
            each.work()
        each.until_ended(*requests)
    assert recorder.num_captured > 0
    for name in requests:
        assert np.abs(captured.pixels(name) - driven.pixels(name)).max() <= 1
    captured.core.close()


@pytest.mark.slow
def test_a_call_that_fits_without_the_graphs_is_not_halved(tiny_checkpoint: Path) -> None:
    driven = Driven(tiny_checkpoint, device=Recorder())
    driven.add("first", REQUEST)
    driven.until_ended("first")
    placed = driven.core.here[0]
    assert placed.graphs
    refused: list[int] = []

    def before(rows: torch.Tensor) -> None:
        if len(rows) == 4 and placed.graphs and not refused:
            refused.append(len(rows))
            raise torch.OutOfMemoryError

    driven.before = before
    max_pixels = driven.core.max_pixels
    for name in ("one", "two"):
        driven.add(name, REQUEST)
    driven.until_ended("one", "two")
    assert refused == [4]
    assert driven.core.max_pixels == max_pixels
    assert set(driven.num_rows[driven.num_rows.index(4) :]) == {4}
    assert np.abs(driven.pixels("one") - driven.pixels("first")).max() <= 1
    driven.core.close()


@pytest.mark.slow
def test_graphs_that_come_again_save_no_call_from_being_halved(tiny_checkpoint: Path) -> None:
    driven = Driven(tiny_checkpoint, device=Recorder())
    driven.add("first", REQUEST)
    driven.until_ended("first")

    def before(rows: torch.Tensor) -> None:
        if len(rows) > 2:
            raise torch.OutOfMemoryError

    driven.before = before
    for name in ("one", "two"):
        driven.add(name, REQUEST)
    driven.until_ended("one", "two")
    assert driven.core.max_pixels == 2 * 64 * 64
    driven.core.close()


def test_a_picture_whose_decoding_does_not_fit_is_decoded_in_tiles(driven: Driven) -> None:
    driven.add("first", REQUEST)
    driven.until_ended("first")
    vae = driven.core.here[0].models.vae

    def before(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        if arguments[0].shape[-1] > 16:
            raise torch.OutOfMemoryError

    vae.decoder.register_forward_pre_hook(before)
    driven.add("large", changed(REQUEST, width=256, height=192, steps=2))
    driven.until_ended("large")
    assert driven.pixels("large").shape == (1, 192, 256, 3)


def test_a_single_row_that_does_not_fit_fails_its_job_only(driven: Driven) -> None:
    def before(rows: torch.Tensor) -> None:
        if rows.shape[-1] > 8:
            raise torch.OutOfMemoryError

    driven.add("first", REQUEST)
    driven.until_ended("first")
    driven.before = before
    driven.add("large", changed(REQUEST, width=128))
    driven.add("small", REQUEST)
    driven.until_ended("large", "small")
    assert str(driven.outcomes["large"]) == NO_MEMORY
    assert np.array_equal(driven.pixels("small"), driven.pixels("first"))


def test_a_single_row_has_the_memory_of_checkpoints_that_nobody_uses(driven: Driven, others: list[Path]) -> None:
    def before(rows: torch.Tensor) -> None:
        if len(driven.core.here) > 1:
            raise torch.OutOfMemoryError

    driven.add("other", REQUEST, others[0])
    driven.until_ended("other")
    driven.before = before
    driven.add("large", changed(REQUEST, exclusive=True))
    driven.until_ended("large")
    assert driven.pixels("large").shape == (1, 64, 64, 3)


@pytest.mark.parametrize("times", [1, 2])
def test_a_job_of_which_a_stage_does_not_fit_begins_once_more(driven: Driven, times: int) -> None:
    driven.add("first", REQUEST)
    driven.until_ended("first")
    left = [torch.OutOfMemoryError] * times

    def before(*_: Any) -> None:
        if left:
            raise left.pop()

    driven.core.here[0].models.text_encoders[0].model.register_forward_pre_hook(before)
    driven.add("short", REQUEST)
    driven.until_ended("short")
    if times == 1:
        assert np.array_equal(driven.pixels("short"), driven.pixels("first"))
    else:
        assert str(driven.outcomes["short"]) == NO_MEMORY


def test_a_call_that_breaks_fails_only_the_job_that_breaks_it(driven: Driven) -> None:
    def before(rows: torch.Tensor) -> None:
        if bool((rows.abs() > 50).any()):
            raise ValueError("a broken wish")

    driven.add("first", REQUEST)
    driven.until_ended("first")
    driven.before = before
    driven.add("good", REQUEST)
    driven.until(lambda: driven.progress["good"])
    bad = driven.add("bad", REQUEST)
    driven.until(lambda: bad.wish is not None)
    assert bad.wish is not None
    bad.wish = replace(bad.wish, x=bad.wish.x * 1000)
    driven.until_ended("good", "bad")
    assert str(driven.outcomes["bad"]) == INTERNAL
    assert np.abs(driven.pixels("good") - driven.pixels("first")).max() <= 1


def test_nan_fails_its_own_job_and_not_its_company(driven: Driven) -> None:
    driven.add("good", REQUEST)
    bad = driven.add("bad", REQUEST)
    driven.until(lambda: bad.wish is not None)
    assert bad.wish is not None
    bad.wish = replace(bad.wish, x=bad.wish.x * float("nan"))
    driven.until_ended("good", "bad")
    assert isinstance(driven.outcomes["bad"], JobError)
    assert "NaN" in str(driven.outcomes["bad"])
    driven.pixels("good")


@pytest.mark.slow
def test_a_second_pass_goes_on_among_runs_of_its_own_size(driven: Driven) -> None:
    alone = changed(REQUEST, enable_hr=True, denoising_strength=0.5)
    driven.add("alone", alone)
    driven.until_ended("alone")
    driven.add("company", changed(REQUEST, steps=12, n_iter=2))
    driven.add("larger", changed(REQUEST, width=128, height=128, steps=12))
    driven.add("in company", alone)
    driven.until_ended("company", "larger", "in company")
    assert driven.progress["in company"][-1] == 12
    assert driven.pixels("in company").shape == (1, 128, 128, 3)
    assert np.abs(driven.pixels("in company").astype(int) - driven.pixels("alone")).max() <= 1


@pytest.mark.slow
def test_a_refined_job_goes_on_among_runs_of_the_refiner(driven: Driven, others: list[Path]) -> None:
    """With one place for models: what a job needs beside its checkpoint waits for none."""
    driven.core.close()
    driven = Driven(driven.checkpoint, max_models=1)
    refined = changed(REQUEST, refiner_checkpoint=others[0].stem, refiner_switch_at=0.5)
    driven.add("alone", refined, None, others[0])
    driven.until_ended("alone")
    driven.num_rows.clear()
    for seed in (3, 4):
        driven.add(str(seed), changed(refined, seed=seed), None, others[0])
    driven.add("company", changed(REQUEST, steps=12))
    driven.until_ended("3", "4", "company")
    assert {6, 4} <= set(driven.num_rows)  # first among all, then among the refined
    assert np.abs(driven.pixels("3") - driven.pixels("alone")).max() <= 1
    assert len(driven.core.warm_models) == 2
    driven.add("unrefined", REQUEST)
    driven.until_ended("unrefined")
    assert np.abs(driven.pixels("unrefined") - driven.pixels("alone")).max() > 1
    driven.core.close()


@pytest.mark.slow
def test_a_second_pass_may_have_a_checkpoint_of_its_own(driven: Driven, others: list[Path]) -> None:
    request = changed(REQUEST, enable_hr=True, denoising_strength=0.5, hr_checkpoint_name=others[0].name)
    driven.add("both", request, None, others[0])
    driven.add("one", changed(request, hr_checkpoint_name=""))
    driven.until_ended("both", "one")
    assert driven.pixels("both").shape == (1, 128, 128, 3)
    assert np.abs(driven.pixels("both") - driven.pixels("one")).max() > 1


@pytest.mark.slow
def test_a_checkpoint_of_another_family_cannot_go_on_with_the_latents(driven: Driven, tmp_path: Path) -> None:
    sdxl = make(tmp_path / "xl.safetensors").path
    driven.add("refined", changed(REQUEST, refiner_checkpoint="xl"), None, sdxl)
    second = {"enable_hr": True, "hr_checkpoint_name": "xl"}
    driven.add("latents", changed(REQUEST, **second), None, sdxl)
    driven.add("pixels", changed(REQUEST, **second, hr_upscaler="Lanczos"), None, sdxl)
    driven.until_ended("refined", "latents", "pixels")
    assert str(driven.outcomes["refined"]).startswith("refiner_checkpoint xl.safetensors cannot go on with the latents")
    assert "so hr_upscaler Latent cannot scale them; Lanczos scales pixels" in str(driven.outcomes["latents"])
    assert driven.pixels("pixels").shape == (1, 128, 128, 3)


def test_checkpoints_and_sizes_take_turns(driven: Driven, others: list[Path]) -> None:
    """A long job that came first does not keep others waiting to its end."""
    driven.add("long", changed(REQUEST, steps=150, n_iter=3))
    driven.until(lambda: driven.progress["long"])
    driven.add("other size", changed(REQUEST, width=128))
    driven.add("other checkpoint", REQUEST, others[0])
    driven.until_ended("other size", "other checkpoint")
    assert "long" not in driven.outcomes


def test_jobs_that_somebody_waits_for_go_first(driven: Driven) -> None:
    driven.add("long", changed(REQUEST, steps=40))
    driven.add("size", changed(REQUEST, width=128, steps=20))
    driven.until(lambda: driven.progress["size"])
    driven.add("urgent", changed(REQUEST, height=128, steps=10), is_urgent=True)
    done = len(driven.progress["size"]), len(driven.progress["long"])
    driven.until_ended("urgent")
    assert len(driven.progress["size"]) + len(driven.progress["long"]) - sum(done) <= 2
    driven.until_ended("size", "long")


@pytest.mark.slow
def test_more_checkpoints_than_places_are_run_in_order_of_arrival(driven: Driven, others: list[Path]) -> None:
    driven.add("long", changed(REQUEST, steps=40))
    driven.add("second", changed(REQUEST, steps=20), others[0])
    driven.add("third", REQUEST, others[1])  # waits for a place
    driven.add("late", REQUEST)  # its checkpoint is here, but it must not keep the place for ever
    driven.until_ended("long", "second", "third", "late")
    assert driven.ended.index("third") > driven.ended.index("second")
    assert len(driven.core.warm_models) == 2


def test_jobs_go_on_while_the_next_checkpoint_is_read(
    driven: Driven, others: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    driven.add("first", REQUEST)
    driven.until_ended("first")
    is_reading, may_end, load = threading.Event(), threading.Event(), weights.load

    def held_up(*arguments: Any) -> weights.Models:
        is_reading.set()
        assert may_end.wait(120)
        return load(*arguments)

    monkeypatch.setattr(weights, "load", held_up)
    driven.add("next", REQUEST, others[0])
    driven.add("goes on", changed(REQUEST, steps=12))
    try:
        driven.core.work()
        while "goes on" not in driven.outcomes:
            assert not driven.core.is_idle
            driven.core.work()
        assert is_reading.wait(120)
        assert "next" not in driven.outcomes
    finally:
        may_end.set()
    driven.until_ended("next")
    driven.pixels("next")


@pytest.mark.slow
def test_a_lora_of_one_pass_alone_is_a_checkpoint_with_its_merge_in_that_pass(driven: Driven, tmp_path: Path) -> None:
    style, merge = tmp_path / "style.safetensors", tmp_path / "merge.safetensors"
    tiny_lora.write(style)
    tiny_lora.merge(driven.checkpoint, merge)
    lora = as_cached(style, "Lora")
    request = changed(REQUEST, enable_hr=True, denoising_strength=0.5)
    driven.add("in the first", changed(request, prompt="a cat <lora:style>", hr_prompt="a cat"), None, lora)
    driven.add("in the second", changed(request, hr_prompt="a cat <lora:style>"), None, lora)
    driven.add("in both", changed(request, prompt="a cat <lora:style>"), None, lora)
    driven.until_ended("in the first", "in the second", "in both")
    plain = driven.checkpoint
    for name, first, second in (
        ("in the first", merge, plain),
        ("in the second", plain, merge),
        ("in both", merge, merge),
    ):
        driven.add(f"merged {name}", changed(request, hr_checkpoint_name=second.name), first, second)
        driven.until_ended(f"merged {name}")
        assert np.abs(driven.pixels(name) - driven.pixels(f"merged {name}")).max() <= 1
    assert np.abs(driven.pixels("in the first") - driven.pixels("in both")).max() > 1
    assert np.abs(driven.pixels("in the second") - driven.pixels("in both")).max() > 1


def test_a_checkpoint_that_cannot_be_loaded_fails_its_job(driven: Driven, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    driven.add("broken", REQUEST, broken)
    driven.add("good", REQUEST)
    driven.until_ended("broken", "good")
    assert "broken.safetensors is damaged" in str(driven.outcomes["broken"])
    driven.pixels("good")
