"""From a prediction to the clean latents that it means, and back; from a noise level to its timestep."""

from __future__ import annotations

import math
from bisect import bisect_left
from functools import lru_cache

import torch

from gpu_worker.models.weights import Config


def clean_latents(x: torch.Tensor, timestep: float, prediction: torch.Tensor, config: Config) -> torch.Tensor:
    """What the UNet takes the clean latents to be, for its scaled input x (Ho et al. 2020, equation 15; Salimans & Ho
    2022, appendix D, for v-prediction), in fp32."""
    signal, noise = _parts(timestep, config)
    x, prediction = x.float(), prediction.float()
    if config["prediction_type"] == "v_prediction":
        return signal * x - noise * prediction
    return (x - noise * prediction) / signal


def prediction_of(x: torch.Tensor, timestep: float, clean: torch.Tensor, config: Config) -> torch.Tensor:
    """The prediction that means these clean latents."""
    signal, noise = _parts(timestep, config)
    x = x.float()
    if config["prediction_type"] == "v_prediction":
        return (signal * x - clean) / noise
    return (x - signal * clean) / noise


def timestep_of(noise_level: float, config: Config) -> int:
    """The first timestep with so much noise for one of signal (k-diffusion's sigma), or the schedule's end."""

    def level(timestep: int) -> float:
        signal, noise = _parts(timestep, config)
        return noise / signal

    return bisect_left(range(config["num_train_timesteps"]), noise_level, key=level)


def _parts(timestep: float, config: Config) -> tuple[float, float]:
    """Signal and noise at a timestep, of the schedule that these families were trained with."""
    alpha = _alpha(round(timestep), config["beta_start"], config["beta_end"], config["num_train_timesteps"])
    return math.sqrt(alpha), math.sqrt(1 - alpha)


@lru_cache(maxsize=4096)
def _alpha(timestep: int, beta_start: float, beta_end: float, num_timesteps: int) -> float:
    """The share of signal in the variance."""
    root = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64)
    return float(torch.prod(1 - root[: timestep + 1] ** 2))
