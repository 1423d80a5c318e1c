"""Writes a network as kohya's sd-scripts do: names, precision, and the metadata that other tools read (`ss_*`,
`sshs_*`, `modelspec.*`; train_network.py, library/train_util.py and library/sai_model_spec.py)."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from gpu_worker.trainer.dataset import Dataset
from gpu_worker.trainer.networks import Tensors
from services.common.payloads.training import Training

_PRECISIONS = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_HEADER_BYTES = 8  # of a safetensors file: the length of its description
_LEGACY_FROM, _LEGACY_BYTES = 0x100000, 0x10000
_ARCHITECTURES = {False: ("sd_v1", "stable-diffusion-v1"), True: ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base")}
_IMPLEMENTATIONS = {False: "diffusers", True: "https://github.com/Stability-AI/generative-models"}  # of their keys


@dataclass(frozen=True)
class Origin:
    """Where a network comes from: its base model's name, SHA-256 and kind, when it began, and in how many epochs, steps
    and batches of an epoch."""

    config: Training
    dataset: Dataset
    base_name: str
    base_sha256: str
    is_sdxl: bool
    is_velocity: bool
    num_epochs: int
    num_steps: int
    num_batches: int
    session_id: int
    began: float


def file_name(config: Training, epoch: int | None) -> str:
    """kohya's name for the file of an epoch, from 1, or for the last one (None)."""
    return f"{config.output_name}.safetensors" if epoch is None else f"{config.output_name}-{epoch:06d}.safetensors"


def step_file_name(config: Training, step: int) -> str:
    """kohya's name for the file of a step, from 1."""
    return f"{config.output_name}-step{step:08d}.safetensors"


def write(path: Path, tensors: Tensors, origin: Origin, epoch: int, step: int) -> None:
    """Writes the file whole or not at all."""
    dtype = _PRECISIONS[origin.config.save_precision]
    cast = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    metadata = _metadata(origin, epoch, step)
    content = save(cast, metadata=metadata | _hashes(cast, metadata))
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def _hashes(tensors: Tensors, metadata: dict[str, str]) -> dict[str, str]:
    """SHA-256 over the tensors alone, which survives other metadata, and the older hash over a part of the file."""
    plain = save(tensors, metadata={name: value for name, value in metadata.items() if name.startswith("ss_")})
    data_from = _HEADER_BYTES + int.from_bytes(plain[:_HEADER_BYTES], "little")
    legacy = plain[_LEGACY_FROM : _LEGACY_FROM + _LEGACY_BYTES]
    return {
        "sshs_model_hash": hashlib.sha256(plain[data_from:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(legacy).hexdigest()[:8],
    }


def _metadata(origin: Origin, epoch: int, step: int) -> dict[str, str]:
    config, dataset = origin.config, origin.dataset
    counts = dataset.counts(regularisation=False)
    own = [picture for picture in dataset.epoch if not picture.is_regularisation]
    arguments = ",".join(f"{name}={value}" for name, value in config.optimizer_args.items())
    facts: dict[str, Any] = {
        "ss_session_id": origin.session_id,
        "ss_training_started_at": origin.began,
        "ss_training_finished_at": time.time(),
        "ss_output_name": config.output_name,
        "ss_learning_rate": config.learning_rate,
        "ss_text_encoder_lr": config.text_encoder_lr,
        "ss_unet_lr": config.unet_lr,
        "ss_num_train_images": len(own),
        "ss_num_reg_images": sum(n * r for r, n in dataset.counts(regularisation=True).values()),
        "ss_num_batches_per_epoch": origin.num_batches,
        "ss_num_epochs": origin.num_epochs,
        "ss_epoch": epoch,
        "ss_max_train_steps": origin.num_steps,
        "ss_steps": step,
        "ss_gradient_checkpointing": config.gradient_checkpointing,
        "ss_gradient_accumulation_steps": config.gradient_accumulation_steps,
        "ss_batch_size_per_device": config.train_batch_size,
        "ss_total_batch_size": config.train_batch_size * config.gradient_accumulation_steps,
        "ss_lr_warmup_steps": config.lr_warmup_steps,
        "ss_lr_scheduler": config.lr_scheduler,
        "ss_optimizer": config.optimizer_type + (f"({arguments})" if arguments else ""),
        "ss_max_grad_norm": config.max_grad_norm,
        "ss_scale_weight_norms": config.scale_weight_norms or None,
        "ss_network_module": config.network_module,
        "ss_network_dim": config.network_dim,
        "ss_network_alpha": config.network_alpha,
        "ss_network_dropout": config.network_dropout or None,
        "ss_mixed_precision": config.mixed_precision,
        "ss_full_fp16": False,
        "ss_v2": False,
        "ss_base_model_version": _ARCHITECTURES[origin.is_sdxl][0],
        "ss_clip_skip": None if origin.is_sdxl else config.clip_skip,
        "ss_max_token_length": config.max_token_length,
        "ss_cache_latents": config.cache_latents,
        "ss_seed": config.seed,
        "ss_lowram": False,
        "ss_noise_offset": config.noise_offset or None,
        "ss_adaptive_noise_scale": config.adaptive_noise_scale or None,
        "ss_multires_noise_iterations": config.multires_noise_iterations or None,
        "ss_multires_noise_discount": config.multires_noise_discount,
        "ss_min_snr_gamma": config.min_snr_gamma,
        "ss_prior_loss_weight": config.prior_loss_weight,
        "ss_caption_dropout_rate": config.caption_dropout_rate,
        "ss_caption_dropout_every_n_epochs": config.caption_dropout_every_n_epochs,
        "ss_caption_tag_dropout_rate": config.caption_tag_dropout_rate,
        "ss_shuffle_caption": config.shuffle_caption,
        "ss_keep_tokens": config.keep_tokens,
        "ss_flip_aug": config.flip_aug,
        "ss_random_crop": False,
        "ss_color_aug": False,
        "ss_face_crop_aug_range": None,
        "ss_resolution": f"({config.resolution[0]}, {config.resolution[1]})",
        "ss_enable_bucket": config.enable_bucket,
        "ss_bucket_no_upscale": config.bucket_no_upscale,
        "ss_min_bucket_reso": config.min_bucket_reso,
        "ss_max_bucket_reso": config.max_bucket_reso,
        "ss_training_comment": config.training_comment,
        "ss_sd_model_name": origin.base_name,
        "ss_new_sd_model_hash": origin.base_sha256,
        "ss_dataset_dirs": _dirs(counts),
        "ss_reg_dataset_dirs": _dirs(dataset.counts(regularisation=True)),
        "ss_tag_frequency": _tags(dataset),
        "ss_bucket_info": _bucket_info(dataset),
    }
    if config.network_args:
        facts["ss_network_args"] = config.network_args
    return {name: _text(value) for name, value in (facts | _model_spec(origin)).items()}


def _model_spec(origin: Origin) -> dict[str, str]:
    """Stability AI's ModelSpec 1.0.0, in which every network beside a model is a `lora`."""
    config = origin.config
    width, height = config.resolution
    given = {
        "author": config.metadata_author,
        "description": config.metadata_description,
        "license": config.metadata_license,
        "tags": config.metadata_tags,
    }
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{_ARCHITECTURES[origin.is_sdxl][1]}/lora",
        "modelspec.implementation": _IMPLEMENTATIONS[origin.is_sdxl],
        "modelspec.title": config.metadata_title or config.output_name,
        **{f"modelspec.{name}": text for name, text in given.items() if text},
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.prediction_type": "v" if origin.is_velocity else "epsilon",
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()),
        **({} if origin.is_sdxl else {"modelspec.encoder_layer": str(config.clip_skip)}),
    }


def _text(value: Any) -> str:
    """A value as kohya writes it: objects as JSON, the rest as Python shows it."""
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _dirs(counts: dict[str, tuple[int, int]]) -> dict[str, Any]:
    return {name: {"n_repeats": repeats, "img_count": count} for name, (repeats, count) in counts.items()}


def _tags(dataset: Dataset) -> dict[str, dict[str, int]]:
    """How often each tag of the captions comes, by folder."""
    found: dict[str, Counter[str]] = {}
    for picture in dataset.pictures:
        if not picture.is_regularisation:
            tags = (tag.strip().lower() for tag in picture.caption.split(","))
            found.setdefault(picture.path.parent.name, Counter()).update(tag for tag in tags if tag)
    return {name: dict(counter) for name, counter in found.items()}


def _bucket_info(dataset: Dataset) -> dict[str, Any]:
    counts = Counter(picture.bucket for picture in dataset.epoch)
    buckets = {
        str(index): {"resolution": list(shape), "count": count}
        for index, (shape, count) in enumerate(sorted(counts.items()))
    }
    return {"buckets": buckets, "mean_img_ar_error": _mean_ratio_error(dataset)}


def _mean_ratio_error(dataset: Dataset) -> float:
    errors = [abs(p.size[0] / p.size[1] - p.bucket[0] / p.bucket[1]) for p in dataset.epoch]
    return sum(errors) / len(errors)
