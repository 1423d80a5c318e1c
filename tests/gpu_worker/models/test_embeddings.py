"""Textual inversion: a word's vectors where the word stood, as if the vocabulary had them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gpu_worker.job import JobError
from gpu_worker.models import embeddings, prompt, weights
from gpu_worker.models.adapters import Adapters, gathered, unfit
from tests.gpu_worker.conftest import as_cached
from tests.gpu_worker.driving import txt2img_of

WIDTH = 32


@pytest.fixture(scope="module")
def models(tiny_checkpoint: Path) -> weights.Models:
    return weights.load(as_cached(tiny_checkpoint), None, "cpu")


def vectors_of(models: weights.Models, word: str) -> torch.Tensor:
    """The vocabulary's own vectors of a word."""
    encoder = models.text_encoders[0]
    tokens = encoder.tokenizer(word, add_special_tokens=False).input_ids
    found: torch.Tensor = encoder.model.get_input_embeddings().weight[tokens].detach()
    return found


def write(path: Path, vectors: torch.Tensor) -> Any:
    if path.suffix == ".pt":
        torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "x", "step": 9}, path)
    else:
        save_file({"emb_params": vectors.contiguous()}, path)
    return as_cached(path, "embeddings")


def read(models: weights.Models, text: str, found: embeddings.Embedding | None = None) -> torch.Tensor:
    with torch.inference_mode():
        return prompt.encode(models, text, 1, Adapters((), {"amypt": found} if found else {}))[0]


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("amypt", "red green fox"),
        ("a photo of Amypt, (amypt:1.3)", "a photo of red green fox, (red green fox:1.3)"),
        ("word, " * 37 + "amypt, end", "word, " * 37 + "BREAK red green fox, end"),
        ("dog " * 60 + ", " + "cat " * 14 + "amypt", "dog " * 60 + ", BREAK " + "cat " * 14 + "red green fox"),
        ("amyptzzz", "amyptzzz"),
    ],
)
def test_a_word_stands_for_its_vectors(
    models: weights.Models, tmp_path: Path, ending: str, text: str, same: str
) -> None:
    file = write(tmp_path / f"amypt.{ending}", vectors_of(models, "red green fox"))
    before = read(models, "amypt")
    found = read(models, text, embeddings.load(file, models, "tiny"))
    assert torch.equal(found, read(models, same))
    assert torch.equal(read(models, "amypt"), before)  # nothing is left behind
    assert not models.text_encoders[0].model.get_input_embeddings()._forward_hooks


def test_an_embedding_for_another_architecture_is_a_word_like_others(models: weights.Models, tmp_path: Path) -> None:
    wide, of_sdxl = write(tmp_path / "amypt.pt", torch.zeros(2, 768)), tmp_path / "xl.safetensors"
    save_file({"clip_l": torch.zeros(2, WIDTH), "clip_g": torch.zeros(2, WIDTH)}, of_sdxl)
    loaded = {file: embeddings.load(file, models, "tiny") for file in (wide, as_cached(of_sdxl, "embeddings"))}
    assert unfit(loaded) == list(loaded)
    assert not gathered(txt2img_of(prompt="amypt"), loaded).embeddings


def test_a_file_that_is_no_embedding_is_refused_by_name(models: weights.Models, tmp_path: Path) -> None:
    path = tmp_path / "y.safetensors"
    save_file({"a": torch.zeros(2, WIDTH), "b": torch.zeros(2, WIDTH)}, path)
    with pytest.raises(JobError, match=r"y.safetensors is no embedding"):
        embeddings.load(as_cached(path, "embeddings"), models, "tiny")


def test_an_embedding_that_fits_no_chunk_fails_by_its_length(models: weights.Models, tmp_path: Path) -> None:
    found = embeddings.load(write(tmp_path / "x.pt", torch.zeros(76, WIDTH)), models, "tiny")
    with pytest.raises(JobError, match="an embedding has 76 vectors; at most 75"):
        read(models, "amypt", found)
