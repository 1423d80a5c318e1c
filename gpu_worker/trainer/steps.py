"""One step: noise on latents, the UNet's guess of it, the loss, and the change of the network's weights.

The loss is that of Ho et al. 2020, equation 14, with kohya's options: noise with other means or of several resolutions,
and weights by the signal-to-noise ratio (Hang et al. 2023, equation 12).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch.nn import functional

from gpu_worker import devices
from gpu_worker.models.weights import Models
from gpu_worker.trainer import optimizers, texts
from gpu_worker.trainer.networks import Network
from services.common.payloads.training import Training

_SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
_PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def precision(config: Training, device: str) -> torch.dtype:
    """What the models compute in. Mixed precision is CUDA's; the CPU gains nothing by it."""
    return _PRECISIONS[config.mixed_precision] if device == "cuda" else torch.float32


@dataclass(frozen=True, eq=False)
class Batch:
    """Pictures that are trained together: latents of shape (n, 4, height/8, width/8) in fp32 and captions, and how much
    each counts, (n,); None: all the same. For SDXL `sizes` are each picture's own height and width, top and left of
    what is seen of it, and the height and width of that, (n, 6) in fp32."""

    latents: torch.Tensor
    captions: Sequence[str]
    weights: torch.Tensor | None = None
    sizes: torch.Tensor | None = None


class Outcome:
    """What became of a step, on its way from the device: reading it waits for that step, not for those behind it."""

    def __init__(self, loss: torch.Tensor, is_skipped: torch.Tensor) -> None:
        self._found = devices.arriving(torch.stack([loss, is_skipped.to(loss.dtype)]))

    @property
    def loss(self) -> float:
        """The mean loss of its batches."""
        return float(self._found()[0])

    @property
    def is_skipped(self) -> bool:
        """Whether the loss scaler left the weights as they were, since their gradients were no numbers."""
        return bool(self._found()[1])


class Steps:
    """The models with a network in them, and what changes its weights, for a training of `num_steps`. `is_velocity`:
    the UNet's output is a velocity (Salimans and Ho 2022, appendix D), not noise."""

    def __init__(
        self, models: Models, network: Network, config: Training, num_steps: int, log: Callable[[str], None]
    ) -> None:
        self._models = models
        self._network = network
        self._config = config
        self._log = log
        self._noising = DDPMScheduler(**{name: models.scheduler_config[name] for name in _SCHEDULE})
        self.is_velocity = config.v_parameterization or models.scheduler_config["prediction_type"] == "v_prediction"
        self._optimizer = optimizers.create_optimizer(config, network, models.device, log)
        self._schedule = optimizers.create_schedule(config, self._optimizer, num_steps)
        self._learns_text = any(parameter.requires_grad for parameter in network.texts)
        self._autocast = models.dtype != torch.float32
        self._scaler = torch.amp.GradScaler(models.device.type, enabled=models.dtype == torch.float16)
        self._latest: Outcome | None = None
        _prepare(models, config, self._learns_text)

    @property
    def rates(self) -> dict[str, float]:
        """The present learning rate of each part of the network, `unet` and `text`."""
        return optimizers.rates(self._optimizer)

    def step(self, batches: Sequence[Batch], generator: torch.Generator) -> Outcome:
        """Changes the weights once for all batches together. The device may still be at it when this returns."""
        scale = self._scale()
        total = torch.zeros((), device=self._models.device)
        for batch in batches:
            loss = self.loss(batch, generator) / len(batches)
            torch.autograd.backward(self._scaler.scale(loss))
            total += loss.detach()
        if self._config.max_grad_norm:
            self._scaler.unscale_(self._optimizer)
            parameters = itertools.chain(self._network.unet, self._network.texts)
            torch.nn.utils.clip_grad_norm_(parameters, self._config.max_grad_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._config.scale_weight_norms:
            self._network.limit(self._config.scale_weight_norms)
        self._settle()
        self._schedule.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._latest = Outcome(total, self._scale() < scale)
        return self._latest

    def loss(self, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        """The mean loss of a batch, with noise and timesteps from the generator, which is the device's."""
        latents, config = batch.latents, self._config
        noise = _noise(latents, config, generator)
        timesteps = torch.randint(
            config.min_timestep, config.max_timestep, latents.shape[:1], generator=generator, device=latents.device
        )
        noisy = self._noising.add_noise(latents, noise, timesteps)
        target = self._noising.get_velocity(latents, noise, timesteps) if self.is_velocity else noise
        guess = self._guess(batch, noisy, timesteps)
        losses = functional.mse_loss(guess.float(), target, reduction="none").mean((1, 2, 3))
        if config.min_snr_gamma:
            losses = losses * self._snr_weights(timesteps, config.min_snr_gamma)
        if batch.weights is not None:
            losses = losses * batch.weights
        return losses.mean()

    def state(self) -> dict[str, Any]:
        """What a later process needs to go on, beside the network's weights."""
        self._settle()
        return {
            "class": type(self._optimizer).__name__,
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from a state, which may be of another device.

        Raises:
            KeyError, RuntimeError, ValueError: it is of other models.
        """
        self._schedule.load_state_dict(state["schedule"])
        found, own = state["class"], type(self._optimizer).__name__
        if found == own:
            optimizers.load_state(self._optimizer, state["optimizer"])
        else:
            self._log(f"the state is of {found}, and here it is {own}: the weights go on, the optimizer begins anew")
            for group, rate in zip(self._optimizer.param_groups, self._schedule.get_last_lr(), strict=True):
                group["lr"] = rate
        if state["scaler"]:  # else there was none; one that is here finds its scale again
            self._scaler.load_state_dict(state["scaler"])

    def _scale(self) -> torch.Tensor:
        """What losses are multiplied by, on the device; it falls with each step that is skipped."""
        return self._scaler.scale(torch.ones((), device=self._models.device))

    def _settle(self) -> None:
        """A step that was skipped does not count for the schedule. This is known only once the device has done it, so
        the rates fall behind with the step after the next one."""
        if self._latest is not None and self._latest.is_skipped:
            self._schedule.last_epoch -= 1
        self._latest = None

    def _guess(self, batch: Batch, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The UNet's output."""
        config, models = self._config, self._models
        with self._precision():
            with torch.set_grad_enabled(self._learns_text):
                hidden, pooled = texts.encode(models, batch.captions, config.clip_skip, config.max_token_length)
            added = None if pooled is None else {"text_embeds": pooled, "time_ids": batch.sizes}
            guess: torch.Tensor = models.unet(noisy, timesteps, hidden, added_cond_kwargs=added, return_dict=False)[0]
        return guess

    def _precision(self) -> AbstractContextManager[None]:
        return torch.autocast(self._models.device.type, self._models.dtype, enabled=self._autocast)

    def _snr_weights(self, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
        signal = self._noising.alphas_cumprod[timesteps]  # add_noise took it to the device
        ratio = signal / (1 - signal)
        weights: torch.Tensor = ratio.clamp(max=gamma) / (ratio + 1 if self.is_velocity else ratio)
        return weights


def _prepare(models: Models, config: Training, learns_text: bool) -> None:
    """Sets what the models do beside computing."""
    trained = [models.unet, *(encoder.model for encoder in models.text_encoders if learns_text)]
    for model in trained:
        model.train()  # for dropout in the network; the models have none of their own
    if config.gradient_checkpointing:
        models.unet.enable_gradient_checkpointing()
        if learns_text:
            for encoder in models.text_encoders:
                encoder.model.activation_checkpointing_enable()


def _noise(latents: torch.Tensor, config: Training, generator: torch.Generator) -> torch.Tensor:
    """Noise for latents with kohya's options (sd-scripts, library/custom_train_functions.py, apply_noise_offset and
    pyramid_noise_like)."""
    noise = _randn(latents.shape, generator)
    if config.noise_offset:
        means = latents.mean((2, 3), keepdim=True).abs()
        offset = (config.noise_offset + config.adaptive_noise_scale * means).clamp(min=0)
        noise = noise + offset * _randn(offset.shape, generator)
    if not config.multires_noise_iterations:
        return noise
    for number in range(config.multires_noise_iterations):
        shrink = (2 + 2 * float(torch.rand(()))) ** number  # by the host's generator, as the device would be waited for
        size = [max(1, int(side / shrink)) for side in latents.shape[2:]]
        coarse = _randn((*latents.shape[:2], *size), generator)
        share = config.multires_noise_discount**number
        noise = noise + share * functional.interpolate(coarse, latents.shape[2:], mode="bilinear")
        if 1 in size:
            break
    return noise / noise.std()


def _randn(shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)
