"""Checkpoint files of all kinds: whole, broken, hostile, and of other architectures."""

import json
import os
import pickle
import tarfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from gpu_worker.job import JobError
from gpu_worker.models import controlnet, ldm, tiny, weights
from tests.gpu_worker import tiny_controlnet
from tests.gpu_worker.conftest import as_cached
from tests.gpu_worker.tables import slow
from tests.gpu_worker.tiny_sdxl import open_clip


@pytest.fixture
def state(tiny_checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(tiny_checkpoint)


def save(path: Path, state: dict[str, torch.Tensor], config: Any = None) -> Path:
    text = config if isinstance(config, str) else json.dumps(config or tiny.config())
    save_file(state, path, metadata={"esd_config": text})
    return path


def load(path: Path, vae: Path | None = None) -> weights.Models:
    return weights.load(as_cached(path), as_cached(vae, "VAE") if vae else None, "cpu")


def reason(path: Path, vae: Path | None = None) -> str:
    with pytest.raises(JobError) as caught:
        load(path, vae)
    return str(caught.value)


def test_models_without_memory_are_made_in_a_thread_while_others_load(tiny_checkpoint: Path) -> None:
    entered, loaded = threading.Event(), threading.Event()

    def make() -> torch.nn.Module:
        with weights.Empty():
            entered.set()
            assert loaded.wait(60)
            return torch.nn.Linear(2, 2)

    with ThreadPoolExecutor(1) as other:
        made = other.submit(make)
        try:
            assert entered.wait(60)
            here = load(tiny_checkpoint).unet
        finally:
            loaded.set()
        assert all(weight.is_meta for weight in made.result().parameters())
    assert not any(weight.is_meta for weight in here.parameters())
    assert not torch.nn.Linear(2, 2).weight.is_meta


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sdxl_refiner"])
def test_every_name_and_shape_of_the_full_size_models_survives_the_original_layout(family: str) -> None:
    config = weights.family_config("sdxl") | weights.family_config(family)
    with weights.Empty():
        unet, vae = UNet2DConditionModel(**config["unet"]), AutoencoderKL(**config["vae"])
    expected = {"sd15": 859_520_964, "sdxl": 2_567_463_684, "sdxl_refiner": 2_259_526_660}[family]  # as published
    assert sum(tensor.numel() for tensor in unet.parameters()) == expected
    assert sum(tensor.numel() for tensor in vae.parameters()) == 83_653_863
    original = {ldm.unet_name(name, config["unet"]): tensor for name, tensor in unet.state_dict().items()}
    for name, tensor in vae.state_dict().items():
        theirs = ldm.vae_name(name, config["vae"])
        original[theirs] = tensor[:, :, None, None] if ldm.is_vae_attention_matrix(theirs) else tensor
    for model, converted in (
        (unet, convert_ldm_unet_checkpoint(original, config["unet"])),
        (vae, convert_ldm_vae_checkpoint(original, config["vae"])),
    ):
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        assert {name: tensor.shape for name, tensor in converted.items()} == shapes


@pytest.mark.parametrize("family", ["sd15", "sdxl_refiner", *slow(["sdxl"])])
def test_every_weight_of_the_full_size_text_encoders_is_found_under_its_original_name(family: str) -> None:
    config = weights.family_config(family)
    state: dict[str, torch.Tensor] = {}
    with weights.Empty():
        if "text_encoder" in config:
            first = CLIPTextModel(CLIPTextConfig(**config["text_encoder"]))
            assert sum(tensor.numel() for tensor in first.parameters()) == 123_060_480  # OpenAI's CLIP ViT-L/14
            prefix = "conditioner.embedders.0.transformer." if family == "sdxl" else "cond_stage_model.transformer."
            state |= {f"{prefix}text_model.{name}": tensor for name, tensor in first.state_dict().items()}
        if "text_encoder_2" in config:
            second = CLIPTextModelWithProjection(CLIPTextConfig(**config["text_encoder_2"]))
            assert sum(tensor.numel() for tensor in second.parameters()) == 694_659_840  # OpenCLIP's ViT-bigG/14
            state |= open_clip(second, f"conditioner.embedders.{1 if family == 'sdxl' else 0}.model.")
        # Which refuses a weight that is missing or of another shape.
        found = weights._load_text_encoders(state, config, weights._Filler("full.safetensors", torch.float16))
    assert len(found) == len([part for part in config if part.startswith("text_encoder")])


@pytest.mark.parametrize(("family", "num_weights"), [("sd15", 361_279_120), ("sdxl", 1_251_014_160)])
def test_every_name_and_shape_of_a_full_size_controlnet_survives_the_original_layout(
    family: str, num_weights: int
) -> None:
    with weights.Empty():
        unet = UNet2DConditionModel(**weights.family_config(family)["unet"])
        net = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    assert sum(tensor.numel() for tensor in net.parameters()) == num_weights
    found = controlnet._converted(tiny_controlnet.original(net), dict(net.config))
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in net.state_dict().items()
    }


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_vae_is_in_bf16_only_where_the_gpu_calculates_in_it(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool, expected: torch.dtype
) -> None:
    """torch says by default that emulation is support."""
    monkeypatch.setattr(
        "torch.cuda.is_bf16_supported", lambda including_emulation=True: has_bf16 or including_emulation
    )
    assert weights.vae_dtype(torch.float16, "cuda") is expected


def test_a_truncated_file_is_refused_by_name(tiny_checkpoint: Path, tmp_path: Path) -> None:
    content = tiny_checkpoint.read_bytes()
    for length in (0, 5, 100, len(content) - 1):
        path = tmp_path / "model.safetensors"
        path.write_bytes(content[:length])
        assert "model.safetensors is damaged or truncated" in reason(path)


def test_a_ckpt_gives_the_same_models_as_the_safetensors(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": state, "callbacks": {print: [1, 2]}, "global_step": 7}, path)
    found, _ = weights.read(path, path.name)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_a_safetensors_file_may_begin_as_a_pickle_or_an_archive_does(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    starts = set()
    for length in range(0, 256, 8):
        save_file({"x": torch.ones(2)}, path, metadata={"padding": "-" * length})
        starts.add(path.read_bytes()[:1])
        assert torch.equal(weights.read(path, path.name)[0]["x"], torch.ones(2))
    assert b"\x80" in starts


@pytest.mark.parametrize("is_zip", [True, False])
def test_code_in_a_pickle_is_never_executed(state: dict[str, torch.Tensor], tmp_path: Path, is_zip: bool) -> None:
    executed = tmp_path / "executed"

    class Hostile:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {executed}",)

    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": state, "payload": Hostile()}, path, _use_new_zipfile_serialization=is_zip)
    assert weights.read(path, path.name)[0].keys() == state.keys()
    assert not executed.exists()


def test_what_torch_would_unpack_into_more_than_the_file_is_refused(tmp_path: Path) -> None:
    path, packed = tmp_path / "plain.ckpt", tmp_path / "model.ckpt"
    torch.save({"x": torch.zeros(1 << 18)}, path)
    with zipfile.ZipFile(path) as plain:
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in plain.namelist():
                archive.writestr(name, plain.read(name))
        assert "model.ckpt is compressed" in reason(packed)
        with zipfile.ZipFile(packed, "w") as archive:
            for name in plain.namelist():
                archive.writestr(name, plain.read(name))
            archive.filelist += archive.filelist
    assert "its members have more bytes than the file" in reason(packed)


@pytest.mark.parametrize(
    "tensors", [{"x": torch.zeros(1, 768).expand(1 << 30, 768)}, dict.fromkeys("abc", torch.zeros(1 << 18))]
)
def test_tensors_that_share_what_the_file_has_once_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / "model.pt"
    torch.save(tensors, path)
    assert "model.pt is damaged: its tensors would have " in reason(path)
    torch.save({"x": tensors.popitem()[1][0], "y": torch.zeros(1 << 10)}, path)
    assert weights.read(path, path.name)[0].keys() == {"x", "y"}


def test_a_tar_of_torch_hidden_behind_a_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("\udc80\x02}."))  # which stands at the start of the file
    assert "model.ckpt is a tar archive as torch wrote it before 0.2" in reason(path)


def test_a_bare_hostile_pickle_is_refused_and_not_executed(tmp_path: Path) -> None:
    executed = tmp_path / "executed"

    class Hostile:
        def __reduce__(self) -> Any:
            return eval, (f"open({str(executed)!r}, 'w')",)

    path = tmp_path / "model.ckpt"
    path.write_bytes(pickle.dumps(Hostile()))
    assert "model.ckpt" in reason(path)
    assert not executed.exists()


def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/constants.pkl", b"")
    assert "TorchScript" in reason(path)


def test_a_clip_without_its_wrapper_name_is_read_as_novelai_wrote_it(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    renamed = {key.replace("transformer.text_model.", "transformer."): tensor for key, tensor in state.items()}
    models = load(save(tmp_path / "novel.safetensors", renamed))
    key = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
    assert torch.equal(models.text_encoders[0].model.final_layer_norm.weight, state[key].float())


def test_a_checkpoint_without_vae_says_so_and_takes_one_from_another_file(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    vae = {key.removeprefix("first_stage_model."): value for key, value in state.items() if "first_stage" in key}
    path = save(tmp_path / "bare.safetensors", {key: state[key] for key in state if "first_stage" not in key})
    assert reason(path) == "bare.safetensors has no VAE in it; name one of type VAE in the job's models"
    models = load(path, save(tmp_path / "vae.safetensors", vae))
    assert torch.equal(models.vae.decoder.conv_in.weight, state["first_stage_model.decoder.conv_in.weight"].float())


def test_what_training_left_in_a_file_changes_nothing(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Averages of the weights, the schedule's numbers, and positions that older transformers saved."""
    left = {f"model_ema.{key.removeprefix('model.').replace('.', '')}": torch.zeros_like(state[key]) for key in state}
    left |= {
        name: torch.zeros(1000) for name in ("betas", "alphas_cumprod", "model_ema.decay", "model_ema.num_updates")
    }
    left["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    models, expected = (
        load(save(tmp_path / "left.safetensors", state | left)),
        load(save(tmp_path / "x.safetensors", state)),
    )
    for part, other in ((models.unet, expected.unet), (models.vae, expected.vae)):
        assert all(torch.equal(one, two) for one, two in zip(part.parameters(), other.parameters(), strict=True))


def test_what_is_no_known_checkpoint_is_named(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    unet_in = "model.diffusion_model.input_blocks.0.0.weight"
    context = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    small = torch.zeros(1)
    assert "architecture that is not known" in reason(save(path, {"double_blocks.0.img_attn.weight": small}))
    assert "is a LoRA" in reason(save(path, {"lora_unet_down_blocks_0.lora_up.weight": small}))
    assert "reads 8 channels" in reason(save(path, state | {unet_in: torch.zeros(16, 8, 3, 3)}))
    save_file(state | {context: torch.zeros(16, 1024)}, path)
    assert "Stable Diffusion 2" in reason(path)


def test_weights_that_lack_or_have_another_shape_are_named(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    gone = "model.diffusion_model.time_embed.0.weight"
    assert "lacks 1 weights of its UNet, such as time_embedding.linear_1.weight" in reason(
        save(path, {key: state[key] for key in state if key != gone})
    )
    assert "time_embedding.linear_1.weight of its UNet has shape (1, 2)" in reason(
        save(path, state | {gone: torch.zeros(1, 2)})
    )
    save_file(state, path)  # without its config it is taken for full size
    assert "not of a size that is known" in reason(path)
    no_clip = {key: state[key] for key in state if "cond_stage" not in key}
    assert reason(save(path, no_clip)) == "model.safetensors has no text encoder in it"


def test_whichever_weight_is_not_there_its_part_is_named(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    parts = {"model.diffusion_model.": "UNet", "first_stage_model.": "VAE", "cond_stage_model.": "text encoder"}
    # The first two are those that diffusers takes without asking, or makes nothing of.
    endings = ("up.3.upsample.conv.bias", "mid.attn_1.k.weight", "final_layer_norm.bias", "out.2.weight")
    for key in [key for key in state if key.endswith(endings)]:
        part = next(part for prefix, part in parts.items() if key.startswith(prefix))
        rest = {name: tensor for name, tensor in state.items() if name != key}
        assert f"weights of its {part}, such as " in reason(save(tmp_path / "model.safetensors", rest))


def test_broken_metadata_is_named(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    second = json.dumps(tiny.config() | {"text_encoder_2": 3})
    nested = "[" * 100_000
    for config in ("{", "[]", '{"unet": 1, "vae": 2, "text_encoder": 3, "scheduler": 4}', second, nested):
        assert "esd_config" in reason(save(path, state, config))
    config = tiny.config()
    config["unet"]["block_out_channels"] = [1, 2]
    assert "describes no UNet" in reason(save(path, state, config))


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("unet", "layers_per_block", 10**9),
        ("unet", "layers_per_block", [2, 2, 2, 10**9]),
        ("unet", "block_out_channels", [16] * 1000),
        ("unet", "sample_size", {"a": 1}),
        ("unet", "attention_head_dim", -1),
        ("vae", "layers_per_block", float("nan")),
        ("text_encoder", "num_hidden_layers", 10**9),
        ("text_encoder", "attn_implementation", "somebody/kernels"),
    ],
)
def test_metadata_beyond_the_known_families_is_refused_before_anything_is_built(
    state: dict[str, torch.Tensor], tmp_path: Path, part: str, name: str, value: Any
) -> None:
    config = tiny.config()
    config[part][name] = value
    assert f"esd_config that is beyond what is known of its {part}" in reason(
        save(tmp_path / "model.safetensors", state, config)
    )


def test_the_same_seed_writes_the_same_tiny_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    tiny.write(tmp_path / "again.safetensors", seed=1)
    tiny.write(tmp_path / "other.safetensors", seed=2)
    assert (tmp_path / "again.safetensors").read_bytes() == tiny_checkpoint.read_bytes()
    assert (tmp_path / "other.safetensors").read_bytes() != tiny_checkpoint.read_bytes()
    assert tiny_checkpoint.stat().st_size < 8_000_000
