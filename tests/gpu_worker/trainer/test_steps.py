"""Steps against a plain loop that is written here, on diffusers' and peft's own ways."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.optimization import SchedulerType, get_scheduler
from peft import LoraConfig

from gpu_worker import weights
from gpu_worker.trainer import networks
from gpu_worker.trainer.steps import Batch, Steps
from gpu_worker.weights import Models
from services.common.payloads.training import Training, check_training
from tests.gpu_worker import tiny_sdxl
from tests.gpu_worker.conftest import as_cached
from tests.gpu_worker.tables import slow

NUM_STEPS = 3
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
CAPTIONS = [["a red circle", "a zog, green"], ["a square", "zog"], ["", "a star on grass"]]
RATES = {"network_dim": 4, "network_alpha": 2, "unet_lr": 1e-2, "text_encoder_lr": 1e-3, "seed": 7}
KEYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "offset, SNR, clip skip, cycles": {
        "noise_offset": 0.1, "min_snr_gamma": 5.0, "clip_skip": 2, "lr_scheduler": "cosine_with_restarts",
        "lr_scheduler_num_cycles": 2, "max_grad_norm": 0.1,
    },
    "velocity, some timesteps": {"v_parameterization": True, "min_snr_gamma": 1.0, "min_timestep": 200,
                                 "max_timestep": 600, "lr_scheduler": "linear", "lr_warmup_steps": 2},
    "accumulated": {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    "the UNet alone": {"network_train_unet_only": True},
    "the UNet alone, by the other's rate": {"text_encoder_lr": 0, "max_grad_norm": 1e-4},
    "the text encoder alone, by the other's rate": {"unet_lr": 0, "max_grad_norm": 1e-4,
                                                    "gradient_checkpointing": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Models]:
    """The models of both families, for tests to copy."""
    sdxl = tiny_sdxl.make(tmp_path_factory.mktemp("sdxl") / "tiny-xl.safetensors")
    return {
        "sd15": weights.load(as_cached(tiny_checkpoint), None, "cpu"),
        "sdxl": sdxl.models,
    }


def batches(models: Models) -> list[Batch]:
    """Two pictures for each step; one of them counts half."""
    generator = torch.Generator().manual_seed(3)
    sizes = torch.tensor([[64.0, 96, 0, 16, 64, 64], [128, 64, 32, 0, 64, 64]]) if models.is_sdxl else None
    return [
        Batch(torch.randn(2, 4, 8, 8, generator=generator), captions, torch.tensor([1.0, 0.5]), sizes)
        for captions in CAPTIONS
    ]


def our_losses(models: Models, config: Training) -> list[float]:
    torch.manual_seed(config.seed)
    steps = Steps(models, networks.create(models, config), config, NUM_STEPS, lambda _: None)
    generator = torch.Generator().manual_seed(11)
    per_step = config.gradient_accumulation_steps
    found = batches(models) * per_step
    groups = [found[start : start + per_step] for start in range(0, len(found), per_step)]
    return [steps.step(group, generator).loss for group in groups]


def reference_losses(models: Models, config: Training) -> list[float]:
    """The plain loop: no part of the trainer is in it."""
    torch.manual_seed(config.seed)
    unet, encoders = models.unet, [encoder.model for encoder in models.text_encoders]
    unet.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=UNET_TARGETS))
    groups = [{"params": [p for p in unet.parameters() if p.requires_grad], "lr": config.unet_rate}]
    if not config.network_train_unet_only:
        for encoder in encoders:
            encoder.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=TEXT_TARGETS))
        groups.append(
            {"params": [p for e in encoders for p in e.parameters() if p.requires_grad], "lr": config.text_rate}
        )
    groups = [group for group in groups if group["lr"]]
    parameters = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups)
    schedule = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=int(config.lr_warmup_steps),
        num_training_steps=NUM_STEPS,
        num_cycles=config.lr_scheduler_num_cycles,
    )
    noising = DDPMScheduler(**BETAS, prediction_type="v_prediction" if config.v_parameterization else "epsilon")
    generator = torch.Generator().manual_seed(11)
    losses, queue = [], batches(models) * config.gradient_accumulation_steps
    for _ in range(NUM_STEPS):
        total = 0.0
        for _ in range(config.gradient_accumulation_steps):
            batch = queue.pop(0)
            noise = torch.randn(2, 4, 8, 8, generator=generator)
            if config.noise_offset:
                noise = noise + config.noise_offset * torch.randn(2, 4, 1, 1, generator=generator)
            times = torch.randint(config.min_timestep, config.max_timestep, (2,), generator=generator)
            noisy = noising.add_noise(batch.latents, noise, times)
            text, added = read(models, batch, config)
            guess = unet(noisy, times, text, added_cond_kwargs=added).sample
            target = noising.get_velocity(batch.latents, noise, times) if config.v_parameterization else noise
            each = (guess - target).square().mean((1, 2, 3))
            if config.min_snr_gamma:
                snr = noising.alphas_cumprod[times] / (1 - noising.alphas_cumprod[times])
                least = torch.minimum(snr, torch.tensor(config.min_snr_gamma))
                each = each * least / (snr + 1 if config.v_parameterization else snr)
            loss = (each * torch.tensor([1.0, 0.5])).mean() / config.gradient_accumulation_steps
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def read(models: Models, batch: Batch, config: Training) -> tuple[torch.Tensor, dict[str, torch.Tensor] | None]:
    """The captions as the diffusers pipelines read them."""
    hidden, pooled = [], None
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


@pytest.mark.parametrize(
    ("family", "name"),
    [("sd15", "plain"), *slow([("sdxl", "plain"), *(("sd15", name) for name in KEYS if name != "plain")])],
)
def test_the_losses_are_those_of_a_plain_loop(plain: dict[str, Models], family: str, name: str) -> None:
    config = check_training(RATES | KEYS[name])
    ours = our_losses(copy.deepcopy(plain[family]), config)
    theirs = reference_losses(copy.deepcopy(plain[family]), config)
    assert len(ours) == NUM_STEPS
    assert ours == pytest.approx(theirs, abs=1e-6, rel=1e-6)


def test_a_step_that_the_loss_scaler_skips_does_not_count_for_the_schedule(plain: dict[str, Models]) -> None:
    models = copy.deepcopy(plain["sd15"])
    config = check_training(RATES | {"lr_scheduler": "linear"})
    steps = Steps(models, networks.create(models, config), config, NUM_STEPS, lambda _: None)
    steps._scaler = torch.amp.GradScaler("cpu")  # as in fp16
    first, second, third = batches(models)
    lost = Batch(second.latents * torch.inf, second.captions)
    outcomes = [steps.step([batch], torch.Generator().manual_seed(1)) for batch in (first, lost, third)]
    assert [outcome.is_skipped for outcome in outcomes] == [False, True, False]
    assert steps.rates["unet"] == pytest.approx(1e-2 * (1 - 2 / NUM_STEPS))


@pytest.mark.slow
def test_a_state_goes_on_where_the_device_makes_another_optimizer(plain: dict[str, Models]) -> None:
    config = check_training(RATES | {"lr_scheduler": "linear"})

    def fresh() -> Steps:
        models = copy.deepcopy(plain["sd15"])
        return Steps(models, networks.create(models, config), config, NUM_STEPS, lines.append)

    lines: list[str] = []
    before, after = fresh(), fresh()
    batch, generator = batches(plain["sd15"])[0], torch.Generator()
    before.step([batch], generator)
    state = before.state()
    after._scaler = torch.amp.GradScaler("cpu")  # as in fp16, of which the CPU knows nothing
    state["optimizer"]["param_groups"][0]["fused"] = True  # as on a GPU
    after.load(state)
    assert [group["fused"] for group in after._optimizer.param_groups] == [None, None]
    assert after.rates == before.rates
    assert lines == []
    assert not after.step([batch], generator).is_skipped

    anew = fresh()
    anew.load(state | {"class": "AdamW8bit"})
    assert lines == ["the state is of AdamW8bit, and here it is AdamW: the weights go on, the optimizer begins anew"]
    assert anew.rates == before.rates
    assert not anew._optimizer.state
    anew.step([batch], generator)
    assert anew.rates == after.rates


@pytest.mark.slow
def test_every_optimizer_and_schedule_changes_the_weights(plain: dict[str, Models]) -> None:
    models = copy.deepcopy(plain["sd15"])
    config = check_training(RATES | {"network_train_text_encoder_only": True})
    network = networks.create(models, config)
    optimizers = ("AdamW", "AdamW8bit", "Lion", "Prodigy")
    rules = {"lr_scheduler_args": ["step_rules=1:1,0.5"]}
    for keys in (
        *({"optimizer_type": name} for name in optimizers),
        *({"lr_scheduler": kind.value} | rules for kind in SchedulerType),
    ):
        lines: list[str] = []
        steps = Steps(models, network, check_training(config.model_dump() | keys), NUM_STEPS, lines.append)
        before = network.texts[0].detach().clone()
        losses = [steps.step([batch], torch.Generator().manual_seed(1)).loss for batch in batches(models)]
        assert all(torch.isfinite(torch.tensor(losses)))
        assert not torch.equal(before, network.texts[0]), keys
        assert any("AdamW8bit: bitsandbytes needs CUDA" in line for line in lines) == ("AdamW8bit" in keys.values())


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"optimizer_args": ["nonsense=1"]}, "optimizer_args are not possible for AdamW: "),
        ({"lr_scheduler": "piecewise_constant"}, "piecewise_constant needs step_rules"),
        ({"unet_lr": 0, "text_encoder_lr": 0}, "nothing would be trained: the learning rate of every part"),
    ],
)
def test_what_an_optimizer_or_schedule_cannot_do_is_named(
    plain: dict[str, Models], keys: dict[str, Any], sentence: str
) -> None:
    models = copy.deepcopy(plain["sd15"])
    config = check_training(RATES | keys)
    network = networks.create(models, config)
    with pytest.raises(Exception, match=sentence):
        Steps(models, network, config, NUM_STEPS, lambda _: None)


def test_captions_of_up_to_225_tokens_are_read_in_chunks(plain: dict[str, Models]) -> None:
    from gpu_worker import prompt
    from gpu_worker.trainer import texts

    models, long = plain["sd15"], ", ".join(["a red circle"] * 60)
    with torch.no_grad():
        hidden, _ = texts.encode(models, [long, "a cat"], clip_skip=1, max_tokens=225)
        alone, _ = texts.encode(models, [long], clip_skip=1, max_tokens=75)
        engine = prompt.encode(models, long, 1)[0]
        short = prompt.encode(models, "a cat", 1)[0]
    assert hidden.shape == (2, 3 * 77, 32)
    assert torch.allclose(hidden[0], engine[0, : 3 * 77], atol=1e-6)
    assert torch.allclose(hidden[1], short[0].repeat(3, 1), atol=1e-6)
    assert torch.allclose(alone[0], engine[0, :77], atol=1e-6)
