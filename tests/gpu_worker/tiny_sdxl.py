"""Owns tiny SDXL models with random weights, base and refiner: as diffusers' parts and pipeline, and as files in
Stability's layout; and texts as SDXL reads them."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from gpu_worker.models import ldm, weights
from tests.gpu_worker.conftest import as_cached
from tests.gpu_worker.reference import scheduler_of

TINY: dict[str, dict[str, Any]] = {
    "unet": {
        "sample_size": 8,
        "cross_attention_dim": 32 + 48,
        "attention_head_dim": [2, 4, 4],
        "block_out_channels": [16, 32, 32],
        "norm_num_groups": 8,
        "transformer_layers_per_block": [1, 1, 2],
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 48 + 6 * 8,
    },
    "vae": {"block_out_channels": [16, 16, 32, 32], "layers_per_block": 1, "norm_num_groups": 8},
    "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "text_encoder_2": {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "projection_dim": 48,
    },
    "scheduler": {},
}
REFINER_UNET = {
    "cross_attention_dim": 48,
    "attention_head_dim": [2, 4, 4, 4],
    "block_out_channels": [16, 32, 32, 32],
    "transformer_layers_per_block": 1,
    "projection_class_embeddings_input_dim": 48 + 5 * 8,
}


@dataclass
class TinySdxl:
    """A checkpoint file, its parts in memory, and what the worker makes of it."""

    path: Path
    parts: dict[str, Any]
    config: dict[str, Any]

    @cached_property
    def models(self) -> weights.Models:
        """As the worker loads them."""
        return weights.load(as_cached(self.path), None, "cpu")

    @cached_property
    def pipeline(self) -> Any:
        """diffusers' own, of a base checkpoint."""
        made = StableDiffusionXLPipeline(**self.components)
        made.set_progress_bar_config(disable=True)
        return made

    @cached_property
    def components(self) -> dict[str, Any]:
        """What diffusers' pipelines are made of; a part that is not there is None."""
        tokenizers = [encoder.tokenizer for encoder in self.models.text_encoders]
        tokenizer = tokenizers[0] if len(tokenizers) > 1 else None
        first = {"tokenizer": tokenizer, "text_encoder": self.parts.get("text_encoder")}
        second = {"tokenizer_2": tokenizers[-1], "text_encoder_2": self.parts["text_encoder_2"]}
        common = {"vae": self.parts["vae"], "unet": self.parts["unet"], "scheduler": scheduler_of("Euler", 0)}
        return first | second | common | {"add_watermarker": False}


def read(pipeline: Any, *chunks: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of a chunk each as one text, every chunk by diffusers' pipeline; none are a text of zeros."""
    found = [pipeline.encode_prompt(chunk, device="cpu", do_classifier_free_guidance=False) for chunk in chunks or [""]]
    text = torch.cat([hidden for hidden, *_ in found], 1), found[0][2]
    return text if chunks else (torch.zeros_like(text[0]), torch.zeros_like(text[1]))


def make(path: Path, is_refiner: bool = False, seed: int = 0) -> TinySdxl:
    """Writes a checkpoint with random weights."""
    full = weights.family_config("sdxl")
    config = {part: full[part] | smaller for part, smaller in TINY.items()}
    if is_refiner:
        del config["text_encoder"]
        config["unet"] = weights.family_config("sdxl_refiner")["unet"] | TINY["unet"] | REFINER_UNET
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: dict[str, Any] = {
            "unet": UNet2DConditionModel(**config["unet"]).eval(),
            "vae": AutoencoderKL(**config["vae"]).eval(),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**config["text_encoder_2"])).eval(),
        }
        if not is_refiner:
            parts["text_encoder"] = CLIPTextModel(CLIPTextConfig(**config["text_encoder"])).eval()
    state = {ldm.unet_name(key, config["unet"]): value for key, value in parts["unet"].state_dict().items()}
    state |= {ldm.vae_name(key, config["vae"]): value for key, value in parts["vae"].state_dict().items()}
    prefix = "conditioner.embedders.0.transformer.text_model."
    if not is_refiner:
        state |= {prefix + key: value for key, value in parts["text_encoder"].state_dict().items()}
    state |= open_clip(parts["text_encoder_2"], f"conditioner.embedders.{0 if is_refiner else 1}.model.")
    tensors = {key: value.contiguous() for key, value in state.items()}
    save_file(tensors, path, metadata={"esd_config": json.dumps(config)})
    return TinySdxl(path, parts, config)


def open_clip(model: CLIPTextModelWithProjection, prefix: str) -> dict[str, torch.Tensor]:
    """The model's weights as open_clip names them: q, k and v in one matrix."""
    state = {key: value for key, value in model.state_dict().items() if "position_ids" not in key}
    found = {}
    for ours, theirs in DIFFUSERS_TO_LDM_MAPPING["openclip"]["layers"].items():
        if ours in state:
            tensor = state.pop(ours)
            found[prefix + theirs] = tensor.T if theirs.endswith("text_projection") else tensor
    for key in [key for key in state if ".q_proj." in key]:
        stem, kind = key.split(".q_proj.")
        joined = torch.cat([state.pop(f"{stem}.{part}_proj.{kind}") for part in "qkv"])
        state[f"{stem}.in_proj_{kind}"] = joined
    for key, tensor in state.items():
        name = key
        for new, old in DIFFUSERS_TO_LDM_MAPPING["openclip"]["transformer"].items():
            name = name.replace(new, old)
        found[f"{prefix}transformer.{name}"] = tensor
    return found
