"""Background removal by ONNX models: how they look at a picture, and files that cannot be used."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gpu_worker.files.cache import CachedModel
from gpu_worker.job import JobError
from gpu_worker.models import rembg
from gpu_worker.models.rembg import mask_of
from tests.gpu_worker import tiny_onnx
from tests.pictures import noise


def model(path: Path, content: bytes, name: str = "u2net.onnx") -> CachedModel:
    path.write_bytes(content)
    return CachedModel("", "rembg", name, path, "")


def test_the_mask_is_what_the_model_says_of_the_picture_as_rembg_prepares_it(tmp_path: Path) -> None:
    """By the formula: divided by the largest value, ImageNet's means and deviations, spread over 0 to 255."""
    image = noise(80, 60, seed=4)
    for name, means, deviations in (
        ("u2net.onnx", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("isnet-general-use.onnx", (0.5, 0.5, 0.5), (1.0, 1.0, 1.0)),
    ):
        found = mask_of(image, model(tmp_path / "m", tiny_onnx.brightness(), name))
        pixels = np.asarray(image.resize((320, 320), Image.Resampling.LANCZOS), dtype=np.float64)
        plane = ((pixels / pixels.max() - means) / deviations).mean(2)
        plane = (plane - plane.min()) / (plane.max() - plane.min()) * 255
        expected = Image.fromarray(plane.astype(np.uint8)).resize(image.size, Image.Resampling.LANCZOS)
        assert np.abs(np.asarray(found).astype(int) - np.asarray(expected)).max() <= 1


def test_a_model_of_another_size_is_shown_that_size(tmp_path: Path) -> None:
    assert mask_of(noise(50, 70), model(tmp_path / "m", tiny_onnx.brightness(64))).size == (50, 70)
    assert mask_of(Image.new("RGB", (9, 9)), model(tmp_path / "m", tiny_onnx.brightness(64))).getextrema() == (0, 0)


def test_a_model_may_not_read_other_files(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(64))
    hostile = tiny_onnx.brightness(initializer=tiny_onnx.outside(str(secret), 64))
    with pytest.raises(JobError, match=r"u2net.onnx has weights in other files; a model must be a single file"):
        mask_of(noise(), model(tmp_path / "m", hostile))


def test_a_model_that_never_ends_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rembg, "_MAX_SECONDS", 0.2)
    endless = model(tmp_path / "m", tiny_onnx.brightness(is_endless=True))
    with pytest.raises(JobError, match=r"u2net.onnx cannot be run: it takes more than 0.2 s for a picture"):
        mask_of(noise(), endless)


@pytest.mark.parametrize("content", [b"", b"nothing", tiny_onnx.brightness()[:60], b"\x08\x08"])
def test_what_is_no_model_is_named(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(JobError, match=r"u2net.onnx is damaged, or no ONNX model: "):
        mask_of(noise(), model(tmp_path / "m", content))


def test_without_the_library_the_sentence_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rembg.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(JobError, match=r"u2net.onnx needs the library onnxruntime, .* GrabCut removes the background"):
        mask_of(noise(), model(tmp_path / "m", tiny_onnx.brightness()))
