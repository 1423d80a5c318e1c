"""A plain training loop on diffusers' and peft's own ways, to compare the trainer with: no part of it is in here."""

import math
from collections.abc import Sequence

import torch
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from peft import LoraConfig

from gpu_worker.models.weights import Models
from gpu_worker.trainer.steps import Batch
from services.common.payloads.training import Training

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


class PlainSteps:
    """Models with a LoRA, and AdamW over it."""

    def __init__(self, models: Models, config: Training, num_steps: int) -> None:
        torch.manual_seed(config.seed)
        self._models, self._config = models, config
        unet, encoders = models.unet, [encoder.model for encoder in models.text_encoders]
        rank = {"r": config.network_dim, "lora_alpha": config.network_alpha}
        unet.add_adapter(LoraConfig(**rank, target_modules=UNET_TARGETS))
        groups = [{"params": [p for p in unet.parameters() if p.requires_grad], "lr": config.unet_rate}]
        if not config.network_train_unet_only:
            for encoder in encoders:
                encoder.add_adapter(LoraConfig(**rank, target_modules=TEXT_TARGETS))
            groups.append(
                {"params": [p for e in encoders for p in e.parameters() if p.requires_grad], "lr": config.text_rate}
            )
        groups = [group for group in groups if group["lr"]]
        self._parameters = [p for group in groups for p in group["params"]]
        self._optimizer = torch.optim.AdamW(groups)
        self._schedule = get_scheduler(
            config.lr_scheduler,
            self._optimizer,
            num_warmup_steps=int(config.lr_warmup_steps),
            num_training_steps=num_steps,
            num_cycles=config.lr_scheduler_num_cycles,
        )
        kind = "v_prediction" if config.v_parameterization else "epsilon"
        self._noising = DDPMScheduler(**BETAS, prediction_type=kind)

    def step(self, batches: Sequence[Batch], generator: torch.Generator) -> float:
        """One change of the weights; the loss of all batches."""
        total = 0.0
        for batch in batches:
            loss = self._loss(batch, generator) / len(batches)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self._parameters, self._config.max_grad_norm)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        return total

    def _loss(self, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        config, noising, count = self._config, self._noising, len(batch.latents)
        noise = torch.randn(count, 4, 8, 8, generator=generator)
        if config.noise_offset:
            each_mean = batch.latents.mean(-1).mean(-1)[..., None, None]
            strength = torch.relu(config.noise_offset + config.adaptive_noise_scale * each_mean.abs())
            noise = noise + strength * torch.randn(count, 4, 1, 1, generator=generator)
        if config.multires_noise_iterations:
            enlarge, weight = torch.nn.Upsample((8, 8), mode="bilinear"), 1.0
            for power in range(config.multires_noise_iterations):
                side = max(1, math.floor(8 / (torch.rand(()).item() * 2 + 2) ** power))
                noise = noise + weight * enlarge(torch.randn(count, 4, side, side, generator=generator))
                weight *= config.multires_noise_discount
                if side == 1:
                    break
            noise = noise / torch.std(noise)
        times = torch.randint(config.min_timestep, config.max_timestep, (count,), generator=generator)
        noisy = noising.add_noise(batch.latents, noise, times)
        text, added = self._read(batch)
        guess = self._models.unet(noisy, times, text, added_cond_kwargs=added).sample
        target = noising.get_velocity(batch.latents, noise, times) if config.v_parameterization else noise
        each = (guess - target).square().mean((1, 2, 3))
        if config.min_snr_gamma:
            snr = noising.alphas_cumprod[times] / (1 - noising.alphas_cumprod[times])
            least = torch.minimum(snr, torch.tensor(config.min_snr_gamma))
            each = each * least / (snr + 1 if config.v_parameterization else snr)
        loss: torch.Tensor = (each if batch.weights is None else each * batch.weights).mean()
        return loss

    def _read(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor | None] | None]:
        """The captions as the diffusers pipelines read them."""
        models, config, hidden, pooled = self._models, self._config, [], None
        for encoder in models.text_encoders:
            tokens = encoder.tokenizer(
                list(batch.captions), padding="max_length", max_length=77, truncation=True, return_tensors="pt"
            ).input_ids
            output = encoder.model(tokens, output_hidden_states=True)
            if models.is_sdxl:
                hidden.append(output.hidden_states[-2])
                pooled = output[0]
            elif config.clip_skip > 1:
                hidden.append(encoder.model.final_layer_norm(output.hidden_states[-config.clip_skip]))
            else:
                hidden.append(output.last_hidden_state)
        added = None if pooled is None else {"text_embeds": pooled, "time_ids": batch.sizes}
        return torch.cat(hidden, -1), added
