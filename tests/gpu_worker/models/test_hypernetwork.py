"""Hypernetworks against A1111's own way with them: what attention makes keys and values of is changed before."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gpu_worker.job import JobError
from gpu_worker.models import hypernetwork, weights
from gpu_worker.models.adapters import Adapters
from gpu_worker.models.lora import Network
from services.common.payloads.prompts import NetworkTag
from tests.gpu_worker import tiny_hypernetwork
from tests.gpu_worker.conftest import as_cached
from tests.gpu_worker.driving import assert_close, drive, latents, txt2img_of
from tests.gpu_worker.models.test_lora import merged
from tests.gpu_worker.models.test_lora import write as write_lora

REQUEST = {"prompt": "a red circle", "steps": 3, "width": 64, "height": 64, "seed": 3}
Made = dict[int, tuple[tiny_hypernetwork.Module, tiny_hypernetwork.Module]]


@pytest.fixture(scope="module")
def models(tiny_checkpoint: Path) -> weights.Models:
    return weights.load(as_cached(tiny_checkpoint), None, "cpu")


def load(path: Path, content: bytes, models: weights.Models) -> Network:
    path.write_bytes(content)
    return hypernetwork.load(as_cached(path, "hypernetworks"), models, "tiny")


def changed(models: weights.Models, made: Made, scale: float) -> weights.Models:
    """A copy whose layers for keys and values have the modules before them."""
    unet: Any = copy.deepcopy(models.unet)
    for attention in [part for part in unet.modules() if hasattr(part, "to_k")]:
        for kind, place in (("to_k", 0), ("to_v", 1)):
            layers = _parts(getattr(attention, kind))
            module = copy.deepcopy(made[layers[-1].in_features][place])
            module.scale = scale
            setattr(attention, kind, nn.Sequential(module, *layers))
    return replace(models, unet=unet)


def _parts(layer: Any) -> list[Any]:
    return [*layer] if isinstance(layer, nn.Sequential) else [layer]


@pytest.mark.parametrize(
    ("structure", "activation", "said"),
    [
        ((1, 2, 1), None, {}),
        ((1, 2, 1), nn.ReLU(), {"activation_func": "relu"}),
        ((1, 2, 4, 1), nn.Hardswish(), {"activation_func": "swish", "is_layer_norm": True, "use_dropout": True}),
        ((1, 1.5, 1), nn.Softsign(), {"activation_func": "softsign", "activate_output": False, "use_dropout": True}),
        ((1, 1), nn.Tanh(), {"activation_func": "tanh", "activate_output": False, "is_layer_norm": True}),
    ],
)
def test_a_hypernetwork_stands_before_the_layers_for_keys_and_values(
    models: weights.Models, tmp_path: Path, structure: Any, activation: Any, said: dict[str, Any]
) -> None:
    made = tiny_hypernetwork.make(1, structure, activation, **said)
    network = load(tmp_path / "mood.pt", tiny_hypernetwork.content(made, **said), models)
    request = txt2img_of(**REQUEST)
    found = drive([(0, latents(request, models, Adapters(((network, NetworkTag("mood", 1.0, 0.7)),))))])[0]
    assert_close(found, drive([(0, latents(request, changed(models, made, 0.7)))])[0])
    without = drive([(0, latents(request, models))])[0]
    assert (found - without).abs().max() > 1e-3 * without.abs().max()


def test_files_of_old_number_their_layers_otherwise(models: weights.Models, tmp_path: Path) -> None:
    made = tiny_hypernetwork.make()
    names = {"linear.0": "linear1", "linear.1": "linear2"}
    pairs = {
        width: [{names[key[:8]] + key[8:]: tensor for key, tensor in part.state_dict().items()} for part in pair]
        for width, pair in made.items()
    }
    torch.save(pairs, tmp_path / "old.pt")
    old = hypernetwork.load(as_cached(tmp_path / "old.pt", "hypernetworks"), models, "tiny").unet
    new = load(tmp_path / "new.pt", tiny_hypernetwork.content(made), models).unet
    x = torch.randn(1, 5, 32)
    for layer in old:
        width = models.unet.get_submodule(layer).in_features
        assert torch.equal(old[layer].delta(x[..., :width]), new[layer].delta(x[..., :width]))


def test_several_networks_follow_each_other_and_are_their_jobs_own(models: weights.Models, tmp_path: Path) -> None:
    one, two = (tiny_hypernetwork.make(seed, activation=nn.ReLU()) for seed in (1, 2))
    files = [tiny_hypernetwork.content(made, activation_func="relu") for made in (one, two)]
    networks = [load(tmp_path / f"{index}.pt", content, models) for index, content in enumerate(files)]
    key = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    adapted, changes = write_lora(tmp_path / "x.safetensors", models, {key: "lora"})
    tag = NetworkTag("x", 1.0, 0.5)
    request = txt2img_of(**REQUEST)
    jobs = [
        Adapters(((networks[0], tag), (adapted, tag), (networks[1], NetworkTag("y", 1.0, -0.8)))),
        Adapters(((networks[1], tag),)),
        Adapters(),
    ]
    found = drive([(index, latents(request, models, adapters)) for index, adapters in enumerate(jobs)])
    # The first one nearest to the input.
    expected = [
        changed(changed(merged(models, (changes, tag)), two, -0.8), one, 0.5),
        changed(models, two, 0.5),
        models,
    ]
    for latent, each in zip(found, expected, strict=True):
        assert_close(latent, drive([(0, latents(request, each))])[0])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"emb_params": torch.ones(2, 32)}, "x.pt is no hypernetwork"),
        ([1, 2], "x.pt is no hypernetwork"),
        ({32: ({}, {})}, "x.pt is damaged: its layers of 32 values do not fit each other"),
        (
            {32: ({"linear.0.weight": torch.ones(16, 32), "linear.0.bias": torch.ones(16)}, {})},
            "x.pt is damaged: its layers of 32 values do not fit each other",
        ),
        (
            {32: ({"linear.0.weight": torch.ones(32, 32), "linear.0.bias": torch.tensor(1.0)}, {})},
            "x.pt is damaged: its layers of 32 values do not fit each other",
        ),
        ({"activation_func": "magic", 32: ({}, {})}, "x.pt has the activation magic; possible: celu, elu, "),
        (
            {32: tuple({"linear.0.weight": torch.ones(1, 1).expand(9999, 32)} for _ in range(2))},
            "x.pt is damaged: its tensors would have 2559744 bytes, the file has ",
        ),
        (
            {5: ({"linear.0.weight": torch.ones(5, 5), "linear.0.bias": torch.ones(5)},) * 2},
            "x.pt is a hypernetwork for another architecture than tiny",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(
    models: weights.Models, tmp_path: Path, content: Any, reason: str
) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(JobError) as refused:
        hypernetwork.load(as_cached(tmp_path / "x.pt", "hypernetworks"), models, "tiny")
    assert str(refused.value).startswith(reason)
