"""What runs need in memory, among runs that come, go and fail."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_worker.devices import Cpu
from gpu_worker.engine.loading import Loader
from gpu_worker.engine.run import Run
from gpu_worker.engine.settings import EngineSettings
from gpu_worker.files.cache import CachedModel
from gpu_worker.models import weights
from tests.gpu_worker import tiny_controlnet, tiny_sdxl
from tests.gpu_worker.conftest import as_cached
from tests.gpu_worker.driving import txt2img_of


class Loading:
    """A loader, with the runs that came out of it and why."""

    def __init__(self) -> None:
        self.loaded = threading.Semaphore(0)
        self.loader = Loader(Cpu(), EngineSettings(), self.loaded.release)
        self.arrived: dict[str, Exception | None] = {}

    def add(self, name: str, *files: CachedModel, is_urgent: bool = False) -> Run:
        run = Run(name, txt2img_of(), list(files), lambda: None, lambda _: None, lambda _: None, is_urgent=is_urgent)
        self.loader.add(run)
        return run

    def look(self) -> None:
        for run, error in self.loader.arrived():
            self.arrived[run.job_id] = error
            if error is not None:
                self.loader.give_back(run)

    def until_arrived(self, *names: str) -> None:
        self.look()
        while not self.arrived.keys() >= set(names):
            assert self.loaded.acquire(timeout=120)
            self.look()


@pytest.fixture
def loading() -> Iterator[Loading]:
    found = Loading()
    yield found
    found.loader.close()


def test_a_load_that_failed_after_its_run_had_gone_fails_nobody_else(
    loading: Loading, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"nothing")
    gone = loading.add("gone", as_cached(path))
    loading.look()
    loading.loader.give_back(gone)
    assert loading.loaded.acquire(timeout=120)
    assert loading.loader.keys == ()
    loading.look()
    path.write_bytes(tiny_checkpoint.read_bytes())
    loading.add("later", as_cached(path))
    loading.until_arrived("later")
    assert loading.arrived == {"later": None}


def test_a_controlnet_is_loaded_for_each_family_that_it_is_named_with(
    loading: Loading, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    sdxl = tiny_sdxl.make(tmp_path / "xl.safetensors").path
    unet = weights.load(as_cached(sdxl), None, "cpu").unet
    net = as_cached(tiny_controlnet.save(tiny_controlnet.make(unet, 0), tmp_path / "net.safetensors"), "ControlNet")
    for round_ in range(2):  # the second finds it in memory
        loading.add(f"wrong {round_}", as_cached(tiny_checkpoint), net)
        loading.add(f"right {round_}", as_cached(sdxl), net, is_urgent=True)
        loading.until_arrived(f"wrong {round_}", f"right {round_}")
        reason = str(loading.arrived[f"wrong {round_}"])
        assert reason == "net.safetensors is a ControlNet for another architecture than tiny.safetensors"
        assert loading.arrived[f"right {round_}"] is None
