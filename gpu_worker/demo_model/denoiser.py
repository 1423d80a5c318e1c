"""Trains the demo model's UNet together with its text encoder, from the latents of pictures that were drawn before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch.utils.data import Dataset
from transformers import CLIPTextConfig, CLIPTextModel

from gpu_worker.demo_model.captions import caption, nothing
from gpu_worker.demo_model.scenes import SCENES
from gpu_worker.demo_model.training import Batch, Plan, Studio, chance, train
from gpu_worker.demo_model.vae import Drawn, tensor
from gpu_worker.models.weights import tokenizer

PLAN = Plan("denoiser", num_steps=14500, learning_rate=1e-3, flat=0.35, num_warmup=100, decay=0.999)
_BATCH = 128
_NUM_PICTURES = 256  # times 256
_NO_SCENE = 0.1  # of the captions, for guidance
_STRANGE = 0.2  # of the captions have words that mean nothing here
_MAX_STRANGE = 4
_MAX_SNR = 5.0  # min-SNR-gamma of Hang et al. 2023
_TOKEN_DEVIATION, _PLACE_DEVIATION = 0.2, 0.1  # CLIP's own 0.02 suits a hundred times as many steps


class Denoiser(torch.nn.Module):
    """What is trained together."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel(**config["unet"])
        self.text_encoder = CLIPTextModel(CLIPTextConfig(**config["text_encoder"]))
        embeddings = self.text_encoder.embeddings
        torch.nn.init.normal_(embeddings.token_embedding.weight, std=_TOKEN_DEVIATION)
        torch.nn.init.normal_(embeddings.position_embedding.weight, std=_PLACE_DEVIATION)

    def forward(self, noised: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The noise in latents of shape (n, 4, 8, 8), given tokens of shape (n, 77)."""
        text = self.text_encoder(tokens).last_hidden_state
        prediction: torch.Tensor = self.unet(noised, timesteps, text).sample
        return prediction


@dataclass(frozen=True)
class _Asked(Dataset[Batch]):
    """For a step: which of the pictures it learns from, and captions of their scenes as tokens."""

    seed: int
    scenes: np.ndarray  # indices, one a picture

    def __getitem__(self, step: int) -> Batch:
        rng = chance(self.seed, PLAN.name, step)
        rows = rng.integers(len(self.scenes), size=_BATCH)
        return rows, _tokens([int(index) for index in self.scenes[rows]], rng)


def trained(config: dict[str, Any], vae: Any, plan: Plan, studio: Studio) -> Denoiser:
    """UNet and text encoder that know the scenes."""
    indices, means, deviations = studio.kept("latents", lambda: _latents(vae, plan, studio))
    torch.manual_seed(studio.seed + 1)
    denoiser = Denoiser(config).to(studio.device)
    signal = _signal(config["scheduler"]).to(studio.device)

    def loss(_: torch.Tensor, batch: list[torch.Tensor]) -> torch.Tensor:
        rows, tokens = batch
        clean = means[rows] + deviations[rows] * torch.randn_like(means[rows])
        timesteps = torch.randint(len(signal), rows.shape, device=rows.device)
        noise, share = torch.randn_like(clean), signal[timesteps][:, None, None, None]
        prediction = denoiser(share.sqrt() * clean + (1 - share).sqrt() * noise, timesteps, tokens)
        snr = share / (1 - share)
        error: torch.Tensor = (snr.clamp(max=_MAX_SNR) / snr * (prediction - noise) ** 2).mean()
        return error

    train(plan, denoiser, _Asked(studio.seed, indices.cpu().numpy()), loss, studio)
    return denoiser


@torch.inference_mode()
def _latents(vae: Any, plan: Plan, studio: Studio) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Indices of scenes, and mean and deviation of the scaled latents of a picture of each."""
    found = []
    for indices, pixels in studio.batches(Drawn(studio.seed, "pictures"), 0, min(_NUM_PICTURES, plan.num_steps)):
        posterior = vae.encode(tensor(pixels)).latent_dist
        found.append((indices, *(part * vae.config.scaling_factor for part in (posterior.mean, posterior.std))))
    indices, means, deviations = (torch.cat(parts) for parts in zip(*found, strict=True))
    return indices, means, deviations


def _tokens(indices: list[int], rng: np.random.Generator) -> np.ndarray:
    """Captions of scenes as the pipeline encodes them: 77 tokens, padded with the end's mark."""
    clip = tokenizer("<|endoftext|>")
    texts = [nothing(rng) if rng.random() < _NO_SCENE else caption(SCENES[index], rng) for index in indices]
    rows = np.full((len(texts), clip.model_max_length), clip.pad_token_id)
    for row, tokens in zip(rows, clip(texts, add_special_tokens=False).input_ids, strict=True):
        if rng.random() < _STRANGE:
            place = [0, len(tokens), int(rng.integers(len(tokens) + 1))][rng.integers(3)]
            strange = rng.integers(clip.bos_token_id, size=rng.integers(1, _MAX_STRANGE + 1))
            tokens[place:place] = strange.tolist()
        row[0] = clip.bos_token_id
        row[1:-1][: len(tokens)] = tokens[: len(row) - 2]
    return rows


def _signal(config: dict[str, Any]) -> torch.Tensor:
    """The share of signal in the variance at each timestep (Ho et al. 2020), of Stable Diffusion's schedule."""
    betas = torch.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, config["num_train_timesteps"]) ** 2
    return torch.cumprod(1 - betas, 0)
