"""Steps against a plain loop."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_worker.job import JobError
from gpu_worker.models import weights
from gpu_worker.models.weights import Models
from gpu_worker.trainer import networks
from gpu_worker.trainer.steps import Batch, Steps
from services.common.payloads.training import Training, check_training
from tests.gpu_worker import tiny_sdxl
from tests.gpu_worker.conftest import as_cached
from tests.gpu_worker.tables import slow
from tests.gpu_worker.trainer.plain import PlainSteps

NUM_STEPS = 3
CAPTIONS = [["a red circle", "a zog, green"], ["a square", "zog"], ["", "a star on grass"]]
RATES = {"network_dim": 4, "network_alpha": 2, "unet_lr": 1e-2, "text_encoder_lr": 1e-3, "seed": 7}
KEYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "offset, SNR, clip skip, cycles": {
        "noise_offset": 0.1, "min_snr_gamma": 5.0, "clip_skip": 2, "lr_scheduler": "cosine_with_restarts",
        "lr_scheduler_num_cycles": 2, "max_grad_norm": 0.1,
    },
    "noise of several resolutions, offset by the latents' means": {
        "multires_noise_iterations": 6, "multires_noise_discount": 0.4, "noise_offset": 0.1,
        "adaptive_noise_scale": -0.7,
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


def groups(models: Models, config: Training) -> list[list[Batch]]:
    """Those of each step."""
    per_step = config.gradient_accumulation_steps
    found = batches(models) * per_step
    return [found[start : start + per_step] for start in range(0, len(found), per_step)]


def our_losses(models: Models, config: Training) -> list[float]:
    torch.manual_seed(config.seed)
    steps = Steps(models, networks.create(models, config), config, NUM_STEPS, lambda _: None)
    generator = torch.Generator().manual_seed(11)
    return [steps.step(group, generator).loss for group in groups(models, config)]


def reference_losses(models: Models, config: Training) -> list[float]:
    steps, generator = PlainSteps(models, config, NUM_STEPS), torch.Generator().manual_seed(11)
    return [steps.step(group, generator) for group in groups(models, config)]


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


def test_a_loss_scaler_changes_nothing_of_what_a_step_does_to_the_weights(plain: dict[str, Models]) -> None:
    config, found = check_training(RATES | {"max_grad_norm": 0.1}), []
    for is_scaled in (False, True):
        models = copy.deepcopy(plain["sd15"])
        torch.manual_seed(config.seed)
        network = networks.create(models, config)
        steps = Steps(models, network, config, NUM_STEPS, lambda _: None)
        steps._scaler = torch.amp.GradScaler("cpu", enabled=is_scaled)  # as in fp16
        steps.step([batches(models)[0]], torch.Generator().manual_seed(1))
        found.append(network.tensors())
    without, scaled = found
    assert all(torch.allclose(scaled[name], without[name], atol=1e-5) for name in without)


def test_a_step_leaves_no_layer_with_more_than_the_largest_norm(plain: dict[str, Models]) -> None:
    models = copy.deepcopy(plain["sd15"])
    config = check_training(RATES | {"scale_weight_norms": 1e-3})
    network = networks.create(models, config)
    Steps(models, network, config, NUM_STEPS, lambda _: None).step([batches(models)[0]], torch.Generator())
    tensors, part = network.tensors(), ".lora_up.weight"
    layers = [name.removesuffix(part) for name in tensors if name.endswith(part)]
    added = [tensors[f"{layer}{part}"].flatten(1) @ tensors[f"{layer}.lora_down.weight"].flatten(1) for layer in layers]
    assert max(float(change.norm()) / 2 for change in added) == pytest.approx(1e-3)  # alpha / rank is a half


@pytest.mark.parametrize("is_on", [False, True])
def test_gradient_checkpointing_computes_what_lies_within_a_block_again(plain: dict[str, Models], is_on: bool) -> None:
    models = copy.deepcopy(plain["sd15"])
    config = check_training(RATES | {"gradient_checkpointing": is_on})
    steps, calls = Steps(models, networks.create(models, config), config, NUM_STEPS, lambda _: None), []
    parts = {
        name: part for model in (models.unet, models.text_encoders[0].model) for name, part in model.named_modules()
    }
    for part in (parts["mid_block.resnets.1"], parts["encoder.layers.0.mlp"]):
        part.register_forward_pre_hook(lambda module, _: calls.append(module))
    steps.step([batches(models)[0]], torch.Generator().manual_seed(1))
    assert len(calls) == (4 if is_on else 2)


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


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (
            {"optimizer_args": ["nonsense=1"]},
            "optimizer_args nonsense: AdamW has no such options; possible: amsgrad, betas, capturable, ",
        ),
        ({"optimizer_args": ["betas=(2, 3)"]}, r"optimizer_args betas=\(2, 3\) are not possible for AdamW: Invalid"),
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
    with pytest.raises(JobError, match=sentence):
        Steps(models, network, config, NUM_STEPS, lambda _: None)


@pytest.mark.parametrize("max_tokens", [75, 150])
def test_a_step_reads_as_much_of_a_caption_as_it_is_told(plain: dict[str, Models], max_tokens: int) -> None:
    models, long = copy.deepcopy(plain["sd15"]), ", ".join(["a red circle"] * 20)  # 80 tokens
    config = check_training(RATES | {"max_token_length": max_tokens})
    steps = Steps(models, networks.create(models, config), config, NUM_STEPS, lambda _: None)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    one, other = (
        float(steps.loss(Batch(latents, [text]), torch.Generator().manual_seed(1)).detach())
        for text in (long, f"{long}, a star")
    )
    assert (one == other) == (max_tokens == 75)


def test_captions_of_up_to_225_tokens_are_read_in_chunks(plain: dict[str, Models]) -> None:
    from gpu_worker.models import prompt
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
