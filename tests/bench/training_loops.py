"""Owns the two loops that the benchmarks of training compare: the trainer's, and a plain one with diffusers and peft.

Models have random weights; latents and captions are made in memory. Nothing comes from the network.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from peft import LoraConfig
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from gpu_worker.models import tiny, weights
from gpu_worker.models.weights import Models, TextEncoder
from gpu_worker.trainer import networks
from gpu_worker.trainer.steps import Batch, Outcome, Steps
from services.common.payloads.training import Training, check_training

# The template's network and rates (contract 12.2).
KEYS: dict[str, Any] = {
    "network_dim": 32, "network_alpha": 16, "unet_lr": 1e-4, "text_encoder_lr": 1e-5, "optimizer_type": "AdamW",
    "lr_scheduler": "cosine_with_restarts", "cache_latents": True, "max_token_length": 75, "clip_skip": 1, "seed": 1,
}  # fmt: skip
CAPTION = "a photo of a small red house on a green hill, in the style of zog"
_UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
_TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
_NUM_STEPS = 1000
Step = Callable[[], Any]


def family_config(family: str) -> dict[str, Any]:
    """`tiny`, `sd15` or `sdxl`."""
    if family == "tiny":
        return tiny.config()
    config: dict[str, Any] = json.loads((resources.files("gpu_worker") / "configs" / f"{family}.json").read_text())
    return config


def models_of(family: str, device: str, dtype: torch.dtype, *, with_vae: bool = False) -> Models:
    """Models with random weights, made on the device."""
    config = family_config(family)
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(**config["unet"]).to(dtype)
        encoders = [CLIPTextModel(CLIPTextConfig(**config["text_encoder"])).to(dtype)]
        if family == "sdxl":
            encoders.append(CLIPTextModelWithProjection(CLIPTextConfig(**config["text_encoder_2"])).to(dtype))
        vae = AutoencoderKL(**config["vae"]).to(dtype).eval() if with_vae else None
    for model in (unet, *encoders, *([vae] if vae else [])):
        model.requires_grad_(False)
    tokenizers = [weights.tokenizer(pad) for pad in ("<|endoftext|>", "!")][: len(encoders)]
    return Models(
        unet=unet,
        vae=vae,
        text_encoders=tuple(
            TextEncoder(tokenizer, encoder) for tokenizer, encoder in zip(tokenizers, encoders, strict=True)
        ),
        scheduler_config=config["scheduler"],
        device=torch.device(device),
        dtype=dtype,
    )


def batch_of(models: Models, side: int, batch_size: int) -> Batch:
    """Pictures of `side` pixels as latents."""
    generator = torch.Generator(models.device).manual_seed(2)
    latents = torch.randn(batch_size, 4, side // 8, side // 8, generator=generator, device=models.device)
    sizes = None
    if models.is_sdxl:
        sizes = torch.tensor([[side, side, 0, 0, side, side]] * batch_size, device=models.device, dtype=models.dtype)
    return Batch(latents, [f"{CAPTION}, {index}" for index in range(batch_size)], None, sizes)


def config_of(models: Models, **keys: Any) -> Training:
    """The template's configuration, in the precision of the models."""
    precisions = {torch.float32: "no", torch.float16: "fp16", torch.bfloat16: "bf16"}
    return check_training(KEYS | {"mixed_precision": precisions[models.dtype]} | keys)


def ours(models: Models, batch: Batch, **keys: Any) -> Step:
    """The trainer's step; it answers the loss. As in a training, the loss of a step is read after the next has begun
    on CUDA."""
    config = config_of(models, **keys)
    torch.manual_seed(config.seed)
    steps = Steps(models, networks.create(models, config), config, _NUM_STEPS, lambda _: None)
    generator = torch.Generator(models.device).manual_seed(3)
    before: list[Outcome] = []

    def step() -> float:
        before.append(steps.step([batch], generator))
        return before.pop(0).loss if len(before) > (models.device.type == "cuda") else 0.0

    return step


def plain(models: Models, batch: Batch, **keys: Any) -> Step:
    """The same as one writes it down with diffusers and peft (after diffusers' examples/text_to_image and
    examples/dreambooth, train_*_lora.py), with the same network, rates, optimizer and precision."""
    config = config_of(models, **keys)
    device, unet = models.device, models.unet
    encoders = [encoder.model for encoder in models.text_encoders]
    torch.manual_seed(config.seed)
    shape = {"r": config.network_dim, "lora_alpha": config.network_alpha}
    unet.add_adapter(LoraConfig(**shape, target_modules=_UNET_TARGETS))
    for encoder in encoders:
        encoder.add_adapter(LoraConfig(**shape, target_modules=_TEXT_TARGETS))
    trained = [[p for p in part.parameters() if p.requires_grad] for part in (unet, *encoders)]
    for parameter in (p for part in trained for p in part):
        parameter.data = parameter.data.float()
    groups = [
        {"params": trained[0], "lr": config.unet_rate},
        {"params": [p for part in trained[1:] for p in part], "lr": config.text_rate},
    ]
    optimizer = torch.optim.AdamW(groups)
    schedule = get_scheduler(config.lr_scheduler, optimizer, num_warmup_steps=0, num_training_steps=_NUM_STEPS)
    noising = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
    scaler = torch.amp.GradScaler(device.type, enabled=models.dtype == torch.float16)
    for model in (unet, *encoders):
        model.train()
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        for encoder in encoders:
            encoder.activation_checkpointing_enable()

    def read() -> tuple[torch.Tensor, dict[str, torch.Tensor | None] | None]:
        hidden, pooled = [], None
        for encoder in models.text_encoders:
            tokens = encoder.tokenizer(
                list(batch.captions), padding="max_length", max_length=77, truncation=True, return_tensors="pt"
            ).input_ids.to(device)
            output = encoder.model(tokens, output_hidden_states=models.is_sdxl)
            hidden.append(output.hidden_states[-2] if models.is_sdxl else output.last_hidden_state)
            pooled = output[0]
        return torch.cat(hidden, -1), {"text_embeds": pooled, "time_ids": batch.sizes} if models.is_sdxl else None

    def step() -> float:
        latents = batch.latents
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(latents),), device=device)
        noisy = noising.add_noise(latents, noise, timesteps)
        with torch.autocast(device.type, models.dtype, enabled=models.dtype != torch.float32):
            text, added = read()
            guess = unet(noisy, timesteps, text, added_cond_kwargs=added).sample
        loss = functional.mse_loss(guess.float(), noise.float())
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_([p for part in trained for p in part], config.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step
