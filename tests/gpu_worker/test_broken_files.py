"""Files of every kind that are damaged or hold NaN: the job fails by name, and no black picture is made."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gpu_worker.devices import Cpu
from gpu_worker.engine.core import Core
from gpu_worker.engine.run import Produced, Run
from gpu_worker.engine.settings import EngineSettings
from gpu_worker.models import tiny
from gpu_worker.pictures import hints
from services.common.payloads import Generation, check
from tests.gpu_worker import tiny_controlnet, tiny_esrgan, tiny_hypernetwork, tiny_lora
from tests.gpu_worker.conftest import as_cached
from tests.gpu_worker.tables import slow
from tests.pictures import encoded, noise

NAN = float("nan")
SMALL = {"prompt": "a cat", "steps": 2, "width": 64, "height": 64, "seed": 3}
UNIT = {"model": "x", "image": encoded(noise())}
# What a job says to use the file `x` of each kind.
USES: dict[str, dict[str, Any]] = {
    "Stable-diffusion": {"override_settings": {"sd_model_checkpoint": "x"}},
    "VAE": {"override_settings": {"sd_vae": "x"}},
    "Lora": {"prompt": "a cat <lora:x:1>"},
    "hypernetworks": {"prompt": "a cat <hypernet:x:1>"},
    "embeddings": {"prompt": "a cat x"},
    "ControlNet": {"alwayson_scripts": {"controlnet": {"args": [UNIT]}}},
    "ESRGAN": {"enable_hr": True, "hr_upscaler": "x", "denoising_strength": 0.5},
}


def outcome(files: list[Any], **fields: Any) -> Any:
    """What becomes of a job with these files."""
    request = check("txt2img", SMALL | fields, "job")
    assert isinstance(request, Generation)
    loaded, outcomes = threading.Semaphore(0), []
    core = Core(Cpu(), EngineSettings(), loaded.release)
    core.add(Run("job", request, files, lambda: None, lambda _: None, outcomes.append, hints.prepared(request)))
    while not outcomes:
        core.work()
        if core.is_idle and not outcomes:
            assert loaded.acquire(timeout=120)
    core.close()
    return outcomes[0]


def controlnet() -> dict[str, torch.Tensor]:
    made: dict[str, torch.Tensor] = tiny_controlnet.make(UNet2DConditionModel(**tiny.config()["unet"]), 0).state_dict()
    return made


def written(path: Path, kind: str, checkpoint: Path) -> Path:
    """A good file of that kind."""
    if kind == "ESRGAN":
        tiny_esrgan.write(path)
        return path
    if kind == "hypernetworks":
        path.write_bytes(tiny_hypernetwork.content())
        return path
    makers: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
        "Stable-diffusion": lambda: load_file(checkpoint),
        "VAE": lambda: load_file(checkpoint),
        "Lora": tiny_lora.state,
        "embeddings": lambda: {"emb_params": torch.ones(2, 32)},
        "ControlNet": controlnet,
    }
    metadata = tiny.config() if kind in {"Stable-diffusion", "VAE"} else None
    save_file(makers[kind](), path, metadata={"esd_config": json.dumps(metadata)} if metadata else None)
    return path


def files_of(path: Path, kind: str, checkpoint: Path) -> list[Any]:
    if kind == "Stable-diffusion":
        return [as_cached(path)]
    return [as_cached(checkpoint), as_cached(path, kind)]


@pytest.mark.parametrize(
    "kind", ["Stable-diffusion", "Lora", *slow(["VAE", "hypernetworks", "embeddings", "ControlNet", "ESRGAN"])]
)
def test_a_file_that_is_truncated_fails_its_job_by_name(tiny_checkpoint: Path, tmp_path: Path, kind: str) -> None:
    path = written(tmp_path / "x.pth", kind, tiny_checkpoint)
    assert isinstance(outcome(files_of(path, kind, tiny_checkpoint), **USES[kind]), Produced)
    path.write_bytes(path.read_bytes()[:-8])
    found = outcome(files_of(path, kind, tiny_checkpoint), **USES[kind])
    assert str(found) == "x.pth is damaged or truncated: it cannot be read as a checkpoint"


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("Stable-diffusion", "model.diffusion_model.out.2.bias"),
        ("Stable-diffusion", "cond_stage_model.transformer.text_model.final_layer_norm.weight"),
        ("Stable-diffusion", "first_stage_model.decoder.conv_out.bias"),
        ("VAE", "first_stage_model.decoder.conv_out.bias"),
        ("Lora", "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"),
        ("embeddings", "emb_params"),
        ("ControlNet", "controlnet_mid_block.bias"),
    ],
)
def test_weights_of_nan_fail_the_job_with_that_word(
    tiny_checkpoint: Path, tmp_path: Path, kind: str, name: str
) -> None:
    path = written(tmp_path / "x.pth", kind, tiny_checkpoint)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    state[name] = torch.full_like(state[name], NAN)
    save_file(state, path, metadata=metadata)
    assert "NaN (not a number)" in str(outcome(files_of(path, kind, tiny_checkpoint), **USES[kind]))
