"""Trains the demo model's VAE: pictures of 64x64 pixels to latents of 4x8x8 and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch.utils.data import Dataset

from gpu_worker.demo_model.scenes import SCENES, draw
from gpu_worker.demo_model.training import Batch, Plan, Studio, chance, train

PLAN = Plan("vae", num_steps=1520, learning_rate=1.5e-3, flat=0.3)
DECODER_PLAN = Plan("decoder", num_steps=2100, learning_rate=1e-3, flat=0.4, num_warmup=50, decay=0.998)
_BATCH, _DECODER_BATCH = 64, 16
_SQUARED_WEIGHT = 0.5
_EDGES_WEIGHT = 2.0
_KL_WEIGHT = 2e-4  # of the mean over all latents
_FIRST_LOGVAR = -4.0  # so that the decoder learns from latents with little noise
_GUIDED = 0.5  # of the steps
_COLOUR_DEVIATION = 0.6  # of a channel of pictures in -1..1
_NUM_MEASURED = 8  # times 256 pictures


@dataclass(frozen=True)
class Drawn(Dataset[Batch]):
    """Pictures for a step: the indices of their scenes, and their pixels."""

    seed: int
    part: str
    number: int = 256

    def __getitem__(self, step: int) -> Batch:
        rng = chance(self.seed, self.part, step)
        indices = rng.integers(len(SCENES), size=self.number)
        return indices, np.stack([draw(SCENES[index], rng) for index in indices])


def tensor(pixels: torch.Tensor) -> torch.Tensor:
    """Pictures of shape (n, 64, 64, 3) as the VAE reads them: (n, 3, 64, 64) in -1..1."""
    return pixels.permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1


def trained(config: dict[str, Any], plan: Plan, studio: Studio) -> Any:
    """An AutoencoderKL whose latents have mean 0 and deviation 1 after scaling."""
    torch.manual_seed(studio.seed)
    vae: Any = AutoencoderKL(**config)
    torch.nn.init.constant_(vae.quant_conv.bias[_channels(vae, logvar=True)], _FIRST_LOGVAR)
    vae.to(studio.device)

    def loss(done: torch.Tensor, batch: list[torch.Tensor]) -> torch.Tensor:
        pictures = tensor(batch[1])
        posterior = vae.encode(pictures).latent_dist
        error = vae.decode(posterior.sample()).sample - pictures
        divergence = (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean() / 2
        guide = (1 - done / _GUIDED).clamp(min=0) * _distance_to_colours(posterior.mean, pictures)
        found: torch.Tensor = error.abs().mean() + _SQUARED_WEIGHT * (error**2).mean() + _KL_WEIGHT * divergence + guide
        return found

    train(plan, vae, Drawn(studio.seed, plan.name, _BATCH), loss, studio)
    _normalise(vae, studio)
    return vae


def sharpen(vae: Any, plan: Plan, studio: Studio) -> None:
    """Trains the decoder alone, with weight on edges, which a star consists of; latents stay what they are."""

    def loss(_: torch.Tensor, batch: list[torch.Tensor]) -> torch.Tensor:
        pictures = tensor(batch[1])
        with torch.no_grad():
            latents = vae.encode(pictures).latent_dist.sample()
        found = vae.decode(latents).sample
        error = found - pictures
        edges = sum((error.diff(dim=axis)).abs().mean() for axis in (2, 3)) / 2
        sharp: torch.Tensor = error.abs().mean() + _SQUARED_WEIGHT * (error**2).mean() + _EDGES_WEIGHT * edges
        return sharp

    decoder = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder])
    train(plan, decoder, Drawn(studio.seed, plan.name, _DECODER_BATCH), loss, studio)


def _distance_to_colours(latents: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """How far three of the channels are from the pictures' colours. Left alone, all four begin as one: brightness."""
    small = torch.nn.functional.avg_pool2d(pictures, pictures.shape[-1] // latents.shape[-1]) / _COLOUR_DEVIATION
    return (latents[:, :3] - small).square().mean()


@torch.inference_mode()
def psnr(vae: Any, studio: Studio) -> float:
    """Peak signal to noise through the VAE of pictures that it was not trained on, in dB."""
    ((_, pixels),) = studio.batches(Drawn(studio.seed, "test"), 0, 1)
    pictures = tensor(pixels)
    through = vae.decode(vae.encode(pictures).latent_dist.mode()).sample.clamp(-1, 1)
    return float(-10 * torch.log10(((through - pictures) / 2).square().mean()))


@torch.inference_mode()
def _normalise(vae: Any, studio: Studio) -> None:
    """Shifts and scales each channel of the latents, within the convolutions on both sides of them: SD1.5's literal
    scaling factor holds."""
    batches = studio.batches(Drawn(studio.seed, "measured"), 0, _NUM_MEASURED)
    latents = torch.cat([vae.encode(tensor(pixels)).latent_dist.mean for _, pixels in batches])
    mean = latents.mean((0, 2, 3))
    scale = 1 / (latents.std((0, 2, 3)) * vae.config.scaling_factor)
    means, logvars = (_channels(vae, logvar) for logvar in (False, True))
    vae.quant_conv.weight[means] *= scale[:, None, None, None]
    vae.quant_conv.bias[means] = (vae.quant_conv.bias[means] - mean) * scale
    vae.quant_conv.bias[logvars] += 2 * scale.log()
    vae.post_quant_conv.bias += (vae.post_quant_conv.weight[:, :, 0, 0] * mean).sum(1)
    vae.post_quant_conv.weight /= scale[:, None, None]


def _channels(vae: Any, logvar: bool) -> slice:
    """Those of the encoder's output that are the latents' means, or the logarithms of their variances."""
    num = vae.config.latent_channels
    return slice(num, 2 * num) if logvar else slice(num)
