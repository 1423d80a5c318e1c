"""The whole recipe: the VAE, then its decoder alone, then UNet and text encoder on its latents; one file of all."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from gpu_worker.demo_model import architecture, denoiser, vae
from gpu_worker.demo_model.training import Plan, Studio
from gpu_worker.models import ldm
from gpu_worker.models.weights import CONFIG_METADATA


def studio(folder: Path, device: str, num_threads: int, num_makers: int, seed: int) -> Studio:
    """A place to train in; `folder` has what survives an interruption, `num_makers` processes make batches ahead."""
    torch.set_num_threads(num_threads)
    return Studio(folder, torch.device(device), seed, num_makers)


def follow(out: Path, studio: Studio, scale: float) -> None:
    """Trains for `scale` of the usual steps and writes the checkpoint."""
    config = architecture.config()
    autoencoder = vae.trained(config["vae"], _scaled(vae.PLAN, scale), studio)
    vae.sharpen(autoencoder, _scaled(vae.DECODER_PLAN, scale), studio)
    print(f"VAE: {vae.psnr(autoencoder, studio):.2f} dB", flush=True)
    found = denoiser.trained(config, autoencoder, _scaled(denoiser.PLAN, scale), studio)
    weights = ldm.checkpoint(config, found.unet, autoencoder, found.text_encoder)
    # One entry: safetensors writes metadata in any order, and the same training shall give the same bytes.
    partial = out.with_suffix(".partial")
    save_file(weights, partial, metadata={CONFIG_METADATA: json.dumps(config)})
    os.replace(partial, out)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB", flush=True)


def _scaled(plan: Plan, scale: float) -> Plan:
    return replace(plan, num_steps=max(2, round(plan.num_steps * scale)))
