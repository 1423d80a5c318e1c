"""LoRA files of every kind against a merge into the weights, alone and in the company of jobs with other LoRAs."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.functional.general import weight_decompose
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_worker.job import JobError
from gpu_worker.models import ldm, lora, weights
from gpu_worker.models.adapters import Adapters
from services.common.payloads.prompts import NetworkTag
from tests.gpu_worker.conftest import as_cached
from tests.gpu_worker.driving import assert_close, drive, latents, steps_of, txt2img_of

Weights = dict[str, torch.Tensor]
REQUEST = {"prompt": "a red circle", "steps": 3, "width": 64, "height": 64, "seed": 3}
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONVOLUTION = "down_blocks.0.resnets.0.conv1"
TEXT = "encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def models(tiny_checkpoint: Path) -> weights.Models:
    return weights.load(as_cached(tiny_checkpoint), None, "cpu")


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def parts(kind: str, shape: torch.Size, seed: int) -> tuple[Weights, torch.Tensor]:
    """Tensors of a kind for a layer, and by the kind's own formula what they change in its weights."""
    out, into, *kernel = shape
    size = 1
    for length in kernel:
        size *= length
    alpha = {"alpha": torch.tensor(2.0)}
    if kind == "lora":
        down, up = random(seed, 4, into, *kernel), random(seed + 1, out, 4, *(1 for _ in kernel))
        change = (up.reshape(out, 4) @ down.reshape(4, -1)) * 2 / 4
        return {"lora_down.weight": down, "lora_up.weight": up} | alpha, change.reshape(shape)
    if kind == "mid":
        down, middle, up = random(seed, 4, into, 1, 1), random(seed + 1, 4, 4, *kernel), random(seed + 2, out, 4, 1, 1)
        change = torch.einsum("or,rskl,si->oikl", up[..., 0, 0], middle, down[..., 0, 0]) * 2 / 4
        return {"lora_down.weight": down, "lora_mid.weight": middle, "lora_up.weight": up} | alpha, change
    if kind == "loha":
        a1, b1, a2, b2 = (random(seed + i, *size_of) for i, size_of in enumerate([(out, 4), (4, into * size)] * 2))
        names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        change = (a1 @ b1) * (a2 @ b2) * 2 / 4
        return dict(zip(names, (a1, b1, a2, b2), strict=True)) | alpha, change.reshape(shape)
    if kind == "lokr":
        one, a, b = random(seed, 4, 4), random(seed + 1, out // 4, 2), random(seed + 2, 2, into // 4 * size)
        change = torch.kron(one, a @ b) * 2 / 2
        return {"lokr_w1": one, "lokr_w2_a": a, "lokr_w2_b": b} | alpha, change.reshape(shape)
    assert kind == "full lokr"
    one, other = random(seed, 2, 2), random(seed + 1, out // 2, into // 2, *kernel)
    change = torch.kron(one.reshape(2, 2, *(1 for _ in kernel)), other)
    return {"lokr_w1": one, "lokr_w2": other} | alpha, change


def write(path: Path, models: weights.Models, kinds: dict[str, str], seed: int = 0) -> tuple[Any, dict[str, Weights]]:
    """A file that changes layers by these kinds, and the changes of the UNet and of the text encoder."""
    state: Weights = {}
    changes: dict[str, Weights] = {"unet": {}, "text": {}}
    for name, kind in kinds.items():
        is_text = name == TEXT
        model = models.text_encoders[0].model if is_text else models.unet
        tensors, change = parts(kind, model.get_submodule(name).weight.shape, seed)
        prefix = "lora_te_text_model_" if is_text else "lora_unet_"
        state |= {f"{prefix}{name.replace('.', '_')}.{part}": tensor for part, tensor in tensors.items()}
        changes["text" if is_text else "unet"][name] = change
    save_file(state, path)
    return lora.load(as_cached(path, "Lora"), models, "tiny"), changes


def merged(models: weights.Models, *uses: tuple[dict[str, Weights], NetworkTag]) -> weights.Models:
    """A copy of the models with the changes in their weights."""
    unet, encoder = copy.deepcopy(models.unet), copy.deepcopy(models.text_encoders[0].model)
    for changes, use in uses:
        for model, part, scale in ((unet, "unet", use.unet_scale), (encoder, "text", use.text_scale)):
            for name, change in changes[part].items():
                model.get_submodule(name).weight.data += scale * change
    return replace(models, unet=unet, text_encoders=(replace(models.text_encoders[0], model=encoder),))


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        ("lora", ATTENTION),
        ("lora", CONVOLUTION),
        ("lora", TEXT),
        ("mid", CONVOLUTION),
        ("loha", ATTENTION),
        ("loha", CONVOLUTION),
        ("lokr", ATTENTION),
        ("lokr", CONVOLUTION),
        ("full lokr", ATTENTION),
        ("full lokr", CONVOLUTION),
        ("lokr", TEXT),
    ],
)
def test_a_network_of_each_kind_equals_its_merge(models: weights.Models, tmp_path: Path, kind: str, layer: str) -> None:
    network, changes = write(tmp_path / "x.safetensors", models, {layer: kind})
    use = NetworkTag("x", 0.8, 0.6)
    request = txt2img_of(**REQUEST)
    found = drive([(0, latents(request, models, Adapters(((network, use),))))])[0]
    expected_models = merged(models, (changes, use))
    assert_close(found, drive([(0, latents(request, expected_models))])[0])
    without = drive([(0, latents(request, models))])[0]
    assert (found - without).abs().max() > 1e-4 * without.abs().max()


@pytest.mark.parametrize("of_output", [True, False])
@pytest.mark.parametrize("kind", ["lora", "mid", "loha", "lokr"])
def test_a_dora_changes_what_lycoris_changes(
    models: weights.Models, tmp_path: Path, kind: str, of_output: bool
) -> None:
    layer = models.unet.get_submodule(CONVOLUTION)
    tensors, change = parts(kind, layer.weight.shape, 0)
    shape = (len(layer.weight), 1, 1, 1) if of_output else (1, layer.weight.shape[1], 1, 1)
    tensors["dora_scale"] = random(9, *shape).abs() + 0.5
    path = tmp_path / "x.safetensors"
    save_file({f"lora_unet_{CONVOLUTION.replace('.', '_')}.{part}": tensor for part, tensor in tensors.items()}, path)
    delta = lora.load(as_cached(path, "Lora"), models, "tiny").unet[CONVOLUTION]
    expected = weight_decompose(layer.weight + change, tensors["dora_scale"], 1, of_output) - layer.weight
    x = random(3, 1, layer.weight.shape[1], 8, 8)
    assert_close(delta(layer, x), torch.nn.functional.conv2d(x, expected, padding=1))


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_a_product_is_rounded_once(models: weights.Models, tmp_path: Path, kind: str) -> None:
    unet = copy.deepcopy(models.unet).half()
    layer = unet.get_submodule(ATTENTION)
    tensors, change = parts(kind, layer.weight.shape, 0)
    path = tmp_path / "x.safetensors"
    save_file({f"lora_unet_{ATTENTION.replace('.', '_')}.{part}": tensor for part, tensor in tensors.items()}, path)
    half = replace(models, unet=unet, dtype=torch.float16)
    delta = lora.load(as_cached(path, "Lora"), half, "tiny").unet[ATTENTION]
    found = delta(layer, torch.eye(layer.weight.shape[1], dtype=torch.float16)).T
    assert torch.equal(found, change.half())


class AllOnMeta(TorchFunctionMode):
    """Within it, whatever is called has tensors of the device `meta` only."""

    def __torch_function__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert {arg.device.type for arg in args if isinstance(arg, torch.Tensor)} <= {"meta"}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["lora", "mid", "loha", "dora"])
def test_a_file_comes_to_the_models_device_though_they_are_away(
    models: weights.Models, tmp_path: Path, kind: str
) -> None:
    """A checkpoint may leave the device while a LoRA for it loads."""
    layer = models.unet.get_submodule(CONVOLUTION)
    tensors, _ = parts("lora" if kind == "dora" else kind, layer.weight.shape, 0)
    if kind == "dora":
        tensors["dora_scale"] = torch.ones(len(layer.weight), 1, 1, 1)
    path = tmp_path / "x.safetensors"
    save_file({f"lora_unet_{CONVOLUTION.replace('.', '_')}.{part}": tensor for part, tensor in tensors.items()}, path)
    elsewhere = replace(models, device=torch.device("meta"))
    delta = lora.load(as_cached(path, "Lora"), elsewhere, "tiny").unet[CONVOLUTION]
    x = torch.zeros(1, layer.weight.shape[1], 8, 8, device="meta")
    with AllOnMeta():
        delta(layer, x)


def test_jobs_with_different_networks_in_one_call_equal_each_its_merge(models: weights.Models, tmp_path: Path) -> None:
    files = [
        {ATTENTION: "lora", TEXT: "lora", CONVOLUTION: "loha"},
        {ATTENTION: "lokr", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k": "lora"},
        {"up_blocks.1.attentions.0.proj_in": "lora", "time_embedding.linear_1": "loha"},
    ]
    networks = [write(tmp_path / f"{i}.safetensors", models, kinds, 10 * i) for i, kinds in enumerate(files)]
    uses = [
        [(0, NetworkTag("0", 1.0, 1.0))],
        [],
        [(1, NetworkTag("1", 0.5, -0.7)), (0, NetworkTag("0", 0.3, 0.0))],
        [(0, NetworkTag("0", 0.0, 0.4)), (1, NetworkTag("1")), (2, NetworkTag("2", 1.0, 2.0))],
        [(2, NetworkTag("2"))],
    ]
    requests = [txt2img_of(**REQUEST | {"seed": i, "cfg_scale": (7, 1)[i % 2]}) for i in range(len(uses))]
    requests[3] = txt2img_of(**REQUEST, batch_size=2)
    tasks = [
        (i % 3, latents(request, models, Adapters(tuple((networks[n][0], use) for n, use in own))))
        for i, (request, own) in enumerate(zip(requests, uses, strict=True))
    ]
    found = drive(tasks, max_rows=5)
    for latent, request, own in zip(found, requests, uses, strict=True):
        alone = merged(models, *((networks[n][1], use) for n, use in own))
        assert_close(latent, drive([(0, latents(request, alone))])[0])
    assert not any(module._forward_hooks for module in models.unet.modules())


def test_sdxls_files_name_layers_as_the_original_layout_does(models: weights.Models, tmp_path: Path) -> None:
    """The same layer under either name; both are in use."""
    tensors, _ = parts("lora", models.unet.get_submodule(ATTENTION).weight.shape, 0)
    original = ldm.unet_name(f"{ATTENTION}.weight", models.unet.config).removeprefix(ldm.UNET).removesuffix(".weight")
    for name in (ATTENTION, original):
        path = tmp_path / "x.safetensors"
        save_file({f"lora_unet_{name.replace('.', '_')}.{part}": tensor for part, tensor in tensors.items()}, path)
        assert list(lora.load(as_cached(path, "Lora"), models, "tiny").unet) == [ATTENTION]


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        (
            {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(4, 8)},
            "x.safetensors is a LoRA for another architecture than tiny, which has no layer lora_te2_text_model_",
        ),
        (
            {
                f"lora_unet_{ATTENTION.replace('.', '_')}.lora_down.weight": torch.zeros(4, 999),
                f"lora_unet_{ATTENTION.replace('.', '_')}.lora_up.weight": torch.zeros(16, 4),
            },
            "for another architecture than tiny: its layer lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_",
        ),
        (
            {f"lora_unet_{ATTENTION.replace('.', '_')}.dora_scale": torch.zeros(4)},
            "possible: LoRA, LoCon, LoHa and LoKr",
        ),
        (
            {f"lora_unet_{ATTENTION.replace('.', '_')}.diff_b": torch.zeros(4)},
            "x.safetensors has 'diff_b' for its layer lora_unet_",
        ),
        ({"unet.down_blocks.lora_A.weight": torch.zeros(4, 4)}, "x.safetensors is no LoRA in kohya's layout"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    models: weights.Models, tmp_path: Path, state: Weights, sentence: str
) -> None:
    path = tmp_path / "x.safetensors"
    save_file(state, path)
    with pytest.raises(JobError) as refused:
        lora.load(as_cached(path, "Lora"), models, "tiny")
    assert sentence in str(refused.value)


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that is made in it."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if torch.is_tensor(made) and made.device.type != "meta":
            self.numel = max(self.numel, made.numel())
        return made


@pytest.mark.parametrize(
    "parts",
    [
        {
            f"hada_w{index}_{part}": torch.zeros(shape)
            for index in (1, 2)
            for part, shape in (("a", (3000, 1)), ("b", (1, 3000)))
        },
        {"lokr_w1": torch.zeros(30, 100), "lokr_w2": torch.zeros(30, 100)},
        {
            "lora_up.weight": torch.zeros(3000, 1),
            "lora_down.weight": torch.zeros(1, 3000),
            "dora_scale": torch.zeros(3000),
        },
        {"diff": torch.zeros(16, 16), "dora_scale": torch.zeros(100_000, 1)},
    ],
)
def test_small_factors_of_a_product_that_does_not_fit_are_not_multiplied(
    models: weights.Models, tmp_path: Path, parts: Weights
) -> None:
    path = tmp_path / "x.safetensors"
    save_file({f"lora_unet_{ATTENTION.replace('.', '_')}.{part}": tensor for part, tensor in parts.items()}, path)
    with Largest() as largest, pytest.raises(JobError, match="is a LoRA for another architecture than tiny"):
        lora.load(as_cached(path, "Lora"), models, "tiny")
    assert largest.numel <= path.stat().st_size


def test_several_texts_and_changing_texts_have_the_guidance_of_their_step(models: weights.Models) -> None:
    request = txt2img_of(prompt="[a cat:a dog:0.5] AND [red|blue] :0.5", negative_prompt="[bad:1]", steps=4)
    found = [step.guidance for step in steps_of(request, models)]

    def expected(text: str) -> torch.Tensor:
        return steps_of(txt2img_of(prompt=text, cfg_scale=1), models)[0].guidance.positives[0][0].text

    for step, (texts, negative) in enumerate(
        [
            (("a cat ", " red"), ""),
            (("a cat ", " red"), ""),
            (("a cat ", " blue"), "bad"),
            (("a dog ", " red"), "bad"),
        ]
    ):
        assert [weight for _, weight in found[step].positives] == [1.0, 0.5]
        assert found[step].negative is not None
        assert torch.equal(found[step].negative.text, expected(negative))
        for (conditioning, _), text in zip(found[step].positives, texts, strict=True):
            assert torch.equal(conditioning.text, expected(text))
    assert found[1].positives[0][0] is found[2].positives[0][0]  # each text is encoded once


def test_a_prompt_that_changes_is_what_its_texts_are_step_by_step(models: weights.Models) -> None:
    """Up to the change it is the first text's picture; from there on, the UNet reads the second."""
    both = {**REQUEST, "steps": 4}
    request = txt2img_of(**both | {"prompt": "[a cat:a dog:1]"})
    tasks = [latents(request, models)] + [
        latents(txt2img_of(**both | {"prompt": p}), models) for p in ("a cat", "a dog")
    ]
    read: list[list[Any]] = [[], [], []]
    with torch.inference_mode():
        for index, task in enumerate(tasks):
            wish = next(task)
            try:
                while True:
                    read[index].append(wish)
                    wish = task.send(torch.zeros_like(wish.x))
            except StopIteration:
                pass
    texts = [[wish.guidance.positives[0][0].text for wish in wishes] for wishes in read]
    assert all(torch.equal(texts[0][step], texts[1 + step // 2][step]) for step in range(4))
