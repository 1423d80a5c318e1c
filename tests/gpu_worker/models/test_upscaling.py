"""Upscalers that are models: tiles against the whole, sizes, and files that are none."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from gpu_worker.files.cache import CachedModel
from gpu_worker.job import JobError
from gpu_worker.models import upscaling
from gpu_worker.models.upscaling import Upscaler, load, upscaled
from tests.gpu_worker.conftest import as_cached
from tests.gpu_worker.driving import finished
from tests.gpu_worker.tiny_esrgan import write
from tests.pictures import noise


@pytest.fixture(scope="module")
def upscaler(tmp_path_factory: pytest.TempPathFactory) -> Upscaler:
    path = tmp_path_factory.mktemp("esrgan") / "4x-tiny.pth"
    write(path)
    return load(as_cached(path, "ESRGAN"), "cpu")


def run(upscaler: Upscaler, image: Image.Image, width: int, height: int) -> np.ndarray:
    with torch.inference_mode():
        return np.asarray(finished(upscaled(upscaler, image, (width, height)))).astype(int)


def test_a_model_of_the_esrgan_family_makes_a_picture_larger_as_spandrel_alone_does(upscaler: Upscaler) -> None:
    image = noise(40, 24)
    x = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255
    with torch.inference_mode():
        expected = (upscaler.model(x)[0].permute(1, 2, 0) * 255).round().numpy()
    assert upscaler.scale == 4
    assert np.abs(run(upscaler, image, 160, 96) - expected).max() <= 1


@pytest.mark.slow
def test_tiles_are_the_whole_picture(upscaler: Upscaler, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model looks less far than tiles lie over each other."""
    image = noise(150, 101, seed=3)
    whole = run(upscaler, image, 600, 404)
    monkeypatch.setattr(upscaling, "TILE", 64)
    with torch.inference_mode():
        steps = list(upscaled(upscaler, image, (600, 404)))
    assert len(steps) == 4 * 3
    assert np.abs(run(upscaler, image, 600, 404) - whole).max() <= 1


def test_any_size_is_reached_by_passes_and_lanczos(upscaler: Upscaler) -> None:
    image = noise(24, 16)
    assert run(upscaler, image, 50, 30).shape == (30, 50, 3)
    assert run(upscaler, image, 120, 80).shape == (80, 120, 3)  # two passes
    same = run(upscaler, image, 24, 16)
    assert np.array_equal(same, np.asarray(image))


def test_too_many_pixels_on_the_way_are_refused(upscaler: Upscaler) -> None:
    with pytest.raises(
        JobError, match=r"4x-tiny.pth would make 16000x12000 pixels on the way; at most 134217728 are pos"
    ):
        run(upscaler, Image.new("RGB", (4000, 3000)), 4001, 3000)


def test_files_that_are_no_upscalers_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(JobError, match=r"x.safetensors is no upscaler of an architecture that is known"):
        load(as_cached(path, "ESRGAN"), "cpu")
    path.write_bytes(b"nothing")
    with pytest.raises(JobError, match=r"x.safetensors is damaged or truncated"):
        load(as_cached(path, "ESRGAN"), "cpu")


def test_nan_is_said_and_not_painted(tmp_path: Path) -> None:
    path = tmp_path / "nan.pth"
    write(path, bias=float("nan"))
    with pytest.raises(JobError, match=r"nan.pth produced NaN"):
        run(load(as_cached(path, "ESRGAN"), "cpu"), noise(16, 16), 64, 64)


def test_without_the_library_the_sentence_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(upscaling.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(JobError, match="need the library spandrel, which this worker does not have; possible: Lanczos"):
        load(CachedModel("", "ESRGAN", "x", tmp_path, ""), "cpu")
