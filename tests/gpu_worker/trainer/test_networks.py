"""Files of trained networks: what the models compute with the network in them is what others compute with its file."""

import copy
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gpu_worker.models import lora, weights
from gpu_worker.models.weights import Models
from gpu_worker.trainer import dataset, networks, saving
from services.common.payloads.training import Training, check_training
from tests.gpu_worker import tiny_sdxl
from tests.gpu_worker.conftest import as_cached
from tests.gpu_worker.driving import assert_close
from tests.gpu_worker.reference import pipeline_of
from tests.gpu_worker.tables import slow

LOCON: dict[str, Any] = {"network_dim": 4, "network_alpha": 2, "network_args": ["conv_dim=3", "conv_alpha=2"]}
LYCORIS = {"network_module": "lycoris.kohya", "network_dim": 4, "network_alpha": 2}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"network_dim": 4, "network_alpha": 2},
    "locon": LOCON,
    "loha": LYCORIS | {"network_args": ["algo=loha"]},
    "loha of three factors": LYCORIS | {"network_args": ["algo=loha", "use_tucker=True"]},
    "lokr": LYCORIS | {"network_args": ["algo=lokr", "factor=4"]},
    "lokr of a whole factor": LYCORIS | {"network_dim": 100_000, "network_args": ["algo=lokr", "conv_dim=100000"]},
    "lokr of few factors": LYCORIS | {"network_dim": 1, "network_args": ["algo=lokr", "decompose_both=True"]},
}


def load(path: Path) -> Models:
    return weights.load(as_cached(path), None, "cpu")


@pytest.fixture(scope="module")
def plain(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Models]:
    """The models of both families, for tests to copy."""
    sdxl = tiny_sdxl.make(tmp_path_factory.mktemp("sdxl") / "tiny-xl.safetensors")
    return {"sd15": load(tiny_checkpoint), "sdxl": sdxl.models}


def shaken(models: Models, config: Training, path: Path) -> networks.Network:
    """A network in the models whose weights are random, not 0, and the file that a training writes of it, in fp16."""
    network = networks.create(models, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (*network.unet, *network.texts):
            drawn = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(drawn.half())  # as the file will have it
    found = dataset.Dataset((dataset.Picture(Path("1_zog/a.png"), "zog", (64, 64), (64, 64), (64, 64), 1, False),))
    config = config.model_copy(update={"save_precision": "fp16"})
    origin = saving.Origin(config, found, "base.safetensors", "ab" * 32, models.is_sdxl, False, 1, 1, 1, 1, 0.0)
    saving.write(path, network.tensors(), origin, epoch=1, step=1)
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    return network


def outputs(models: Models, changes: lora.Network | None = None) -> list[torch.Tensor]:
    """What each text encoder and the UNet make of fixed inputs, with a file's network added by the engine."""
    generator = torch.Generator().manual_seed(1)
    found = []
    with torch.no_grad():
        for index, encoder in enumerate(models.text_encoders):
            rows = [(slice(None), 1.0, changes.texts[index])] if changes else []
            with lora.applied(encoder.model, rows):
                found.append(encoder.model(torch.arange(77)[None], output_hidden_states=True).hidden_states[-2])
        config = models.unet.config
        added = {"text_embeds": torch.randn(1, 48, generator=generator), "time_ids": torch.full((1, 6), 64.0)}
        with lora.applied(models.unet, [(slice(None), 1.0, changes.unet)] if changes else []):
            found.append(
                models.unet(
                    torch.randn(1, 4, 8, 8, generator=generator),
                    torch.tensor([500]),
                    torch.randn(1, 77, config.cross_attention_dim, generator=generator),
                    added_cond_kwargs=added if models.is_sdxl else None,
                ).sample
            )
    return found


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("sd15", "lora"),
        *slow([*(("sd15", kind) for kind in KINDS if kind != "lora"), ("sdxl", "locon"), ("sdxl", "loha")]),
    ],
)
def test_the_engine_computes_with_the_file_what_the_trainer_computes_with_the_network(
    family: str, kind: str, plain: dict[str, Models], tmp_path: Path
) -> None:
    base = plain[family]
    models, file = copy.deepcopy(base), tmp_path / "made.safetensors"
    shaken(models, check_training(KINDS[kind]), file)
    loaded = lora.load(as_cached(file, "Lora"), base, "tiny")
    before = outputs(base)
    for ours, theirs, without in zip(outputs(models), outputs(base, loaded), before, strict=True):
        assert_close(ours, theirs)
        assert (ours - without).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["sd15", *slow(["sdxl"])])
def test_diffusers_and_the_engine_load_the_file_with_equal_results(
    family: str, plain: dict[str, Models], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    models, file = copy.deepcopy(plain[family]), tmp_path / "made.safetensors"
    shaken(models, check_training(LOCON), file)
    if family == "sd15":
        pipeline = pipeline_of(tiny_checkpoint, models.text_encoders[0].tokenizer, tmp_path)
    else:
        pipeline = tiny_sdxl.make(tmp_path / "tiny-xl.safetensors").pipeline
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    encoders = [pipeline.text_encoder, *([pipeline.text_encoder_2] if family == "sdxl" else [])]
    theirs = outputs(
        Models(
            unet=pipeline.unet,
            vae=None,
            text_encoders=tuple(weights.TextEncoder(None, encoder) for encoder in encoders),
            scheduler_config={},
            device=models.device,
            dtype=models.dtype,
        )
    )
    engine = outputs(plain[family], lora.load(as_cached(file, "Lora"), plain[family], "tiny"))
    before = outputs(plain[family])
    for trained, ours, other, without in zip(outputs(models), engine, theirs, before, strict=True):
        assert_close(trained, other)
        assert_close(ours, other)
        assert (other - without).abs().max() > 1e-3


def norms(network: networks.Network) -> dict[str, float]:
    """Of what it adds to each layer, as the engine reads it from a file."""
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in network.tensors().items():
        layer, _, part = name.partition(".")
        layers.setdefault(layer, {})[part] = tensor.detach()
    return {layer: float(lora._full(parts).norm()) for layer, parts in layers.items()}


@pytest.mark.parametrize("kind", ["locon", *slow([kind for kind in KINDS if kind != "locon"])])
def test_what_is_added_to_a_layer_is_scaled_down_to_a_norm_and_never_up(
    kind: str, plain: dict[str, Models], tmp_path: Path
) -> None:
    models = copy.deepcopy(plain["sd15"])
    network = shaken(models, check_training(KINDS[kind]), tmp_path / "made.safetensors")
    before = norms(network)
    most = statistics.median(before.values())
    network.limit(most)
    assert norms(network) == pytest.approx({layer: min(norm, most) for layer, norm in before.items()}, rel=1e-4)


DROPOUTS: dict[str, dict[str, Any]] = {
    "network_dropout": KINDS["lora"] | {"network_dropout": 0.5},
    "dropout": LYCORIS | {"network_args": ["algo=locon", "dropout=0.5"]},
    "rank_dropout": LYCORIS | {"network_args": ["algo=loha", "rank_dropout=0.5"]},
    "module_dropout": LYCORIS | {"network_args": ["algo=lokr", "factor=4", "module_dropout=0.5"]},
}


@pytest.mark.parametrize("kind", ["network_dropout", *slow([kind for kind in DROPOUTS if kind != "network_dropout"])])
def test_dropout_acts_in_training_and_nowhere_else(kind: str, plain: dict[str, Models], tmp_path: Path) -> None:
    models = copy.deepcopy(plain["sd15"])
    shaken(models, check_training(DROPOUTS[kind]), tmp_path / "made.safetensors")
    torch.manual_seed(0)  # by chance all of the few layers could be dropped, or none, twice
    for is_training in (True, False, True):
        for model in (models.unet, models.text_encoders[0].model):
            model.train(is_training)
        pairs = zip(outputs(models), outputs(models), strict=True)
        assert [torch.equal(one, other) for one, other in pairs] == [not is_training] * 2


@pytest.mark.parametrize("kind", ["lora", *slow([kind for kind in KINDS if kind != "lora"])])
def test_a_fresh_network_adds_nothing(kind: str, plain: dict[str, Models]) -> None:
    models = copy.deepcopy(plain["sd15"])
    networks.create(models, check_training(KINDS[kind]))
    for with_network, without in zip(outputs(models), outputs(plain["sd15"]), strict=True):
        assert_close(with_network, without)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["locon", *slow(["loha", "lokr"])])
def test_a_network_takes_back_what_it_gave(kind: str, plain: dict[str, Models], tmp_path: Path) -> None:
    config = check_training(KINDS[kind])
    first, second = copy.deepcopy(plain["sd15"]), copy.deepcopy(plain["sd15"])
    shaken(first, config, tmp_path / "made.safetensors")
    networks.create(second, config).load(load_file(tmp_path / "made.safetensors"))
    for ours, other in zip(outputs(first), outputs(second), strict=True):
        assert torch.equal(ours, other)
