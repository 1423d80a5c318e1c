"""What changes the weights, and how fast: as the libraries do whose optimizers and schedules these are."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.optimization import get_scheduler
from lion_pytorch import Lion
from prodigyopt import Prodigy
from transformers.optimization import Adafactor

from gpu_worker.engine.importing import find_hidden
from gpu_worker.trainer import state
from gpu_worker.trainer.optimizers import create_optimizer, create_schedule, load_state, rates
from services.common.payloads.training import SCHEDULERS, check_training

NUM_STEPS = 10


def course(schedule: Any, optimizer: Any) -> list[list[float]]:
    """The learning rates of each step."""
    found = []
    for _ in range(NUM_STEPS):
        found.append(list(schedule.get_last_lr()))
        optimizer.step()
        schedule.step()
    return found


def two_parts() -> Any:
    """An optimizer with two rates."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (2.0, 0.5)]
    return torch.optim.SGD(groups)


@pytest.mark.parametrize(("given", "num_steps"), [(3, 3), (0.35, 3), (0.99, 9), (1, 1), (0, 0)])
def test_below_1_warm_up_is_a_part_of_all_steps_cut_to_whole_ones_as_in_kohya(given: float, num_steps: int) -> None:
    optimizer = two_parts()
    config = check_training({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": given})
    found = course(create_schedule(config, optimizer, NUM_STEPS), optimizer)
    assert [rate for rate, _ in found] == pytest.approx(
        [2 * step / num_steps if step < num_steps else 2 for step in range(NUM_STEPS)]
    )


# Of each schedule: the keys beside its name, and what diffusers' own takes.
SCHEDULES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "constant": ({}, {}),
    "constant_with_warmup": ({"lr_warmup_steps": 4}, {"num_warmup_steps": 4}),
    "linear": ({"lr_warmup_steps": 2}, {"num_warmup_steps": 2}),
    "cosine": ({"lr_warmup_steps": 2}, {"num_warmup_steps": 2}),
    "cosine_with_restarts": (
        {"lr_warmup_steps": 1, "lr_scheduler_num_cycles": 3},
        {"num_warmup_steps": 1, "num_cycles": 3},
    ),
    "polynomial": ({"lr_scheduler_power": 2}, {"num_warmup_steps": 0, "power": 2.0}),
    "piecewise_constant": ({"lr_scheduler_args": ["step_rules=1:3,0.1:6,0.01"]}, {"step_rules": "1:3,0.1:6,0.01"}),
}


def test_the_rates_of_every_schedule_are_diffusers() -> None:
    assert SCHEDULES.keys() == set(SCHEDULERS)
    seen = []
    for name, (keys, options) in SCHEDULES.items():
        ours, theirs = two_parts(), two_parts()
        schedule = create_schedule(check_training({"lr_scheduler": name} | keys), ours, NUM_STEPS)
        expected = get_scheduler(name, theirs, num_training_steps=NUM_STEPS, **options)
        found = course(schedule, ours)
        assert found == course(expected, theirs), name
        assert found not in seen, name
        seen.append(found)


OPTIMIZERS: dict[str, tuple[list[str], Callable[[Any], Any]]] = {
    "AdamW": (["weight_decay=0.1"], lambda groups: torch.optim.AdamW(groups, weight_decay=0.1)),
    "AdamW8bit": ([], torch.optim.AdamW),  # where there is no CUDA
    "Adafactor": (
        ["relative_step=False", "scale_parameter=False", "warmup_init=False"],
        lambda groups: Adafactor(groups, relative_step=False, scale_parameter=False),
    ),
    "Lion": (["betas=0.8,0.9"], lambda groups: Lion(groups, betas=(0.8, 0.9))),
    "Prodigy": (["d_coef=2.0"], lambda groups: Prodigy(groups, d_coef=2.0)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_change_as_in_the_optimizers_own_library(name: str) -> None:
    arguments, create = OPTIMIZERS[name]
    unet_lr, text_lr = (1.0, 1.0) if name == "Prodigy" else (1e-2, 1e-3)
    start = [torch.full((3,), 1.0), torch.full((2,), -2.0)]
    ours, theirs = ([torch.nn.Parameter(tensor.clone()) for tensor in start] for _ in range(2))
    keys = {"optimizer_type": name, "optimizer_args": arguments, "unet_lr": unet_lr, "text_encoder_lr": text_lr}
    lines: list[str] = []
    network: Any = SimpleNamespace(unet=ours[:1], texts=ours[1:])
    optimizer = create_optimizer(check_training(keys), network, torch.device("cpu"), lines.append)
    expected = create([{"params": theirs[:1], "lr": unet_lr}, {"params": theirs[1:], "lr": text_lr}])
    for _ in range(3):
        for parameters, their_optimizer in ((ours, optimizer), (theirs, expected)):
            torch.autograd.backward(torch.cat([parameter**2 for parameter in parameters]).sum())
            their_optimizer.step()
            their_optimizer.zero_grad()
    for our, their, before in zip(ours, theirs, start, strict=True):
        assert torch.equal(our, their)
        assert not torch.equal(our, before)
    assert rates(optimizer).keys() == {"unet", "text"}
    assert any("it needs CUDA" in line for line in lines) == (name == "AdamW8bit")


def test_on_cuda_adamw8bit_is_that_of_bitsandbytes_and_goes_on_from_its_state(tmp_path: Path) -> None:
    """The weights are on the CPU here, where the library computes too."""
    config = check_training({"optimizer_type": "AdamW8bit", "unet_lr": 1e-2, "optimizer_args": ["weight_decay=0.1"]})
    weights = [torch.nn.Parameter(torch.linspace(-1, 1, 8192)) for _ in range(3)]  # of smaller ones it keeps 32 bits
    lines: list[str] = []

    def create(weight: Any) -> Any:
        return create_optimizer(config, SimpleNamespace(unet=[weight], texts=[]), torch.device("cuda"), lines.append)  # type: ignore[arg-type]

    def step(weight: Any, optimizer: Any) -> None:
        torch.autograd.backward((weight**2).sum())
        optimizer.step()
        optimizer.zero_grad()

    ours, theirs, resumed = weights
    optimizer, expected = create(ours), find_hidden("bitsandbytes.optim").AdamW8bit([theirs], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        step(ours, optimizer)
        step(theirs, expected)
    assert torch.equal(ours, theirs)
    assert {tensor.dtype for tensor in optimizer.state[ours].values() if torch.is_tensor(tensor)} >= {torch.uint8}
    state.write(tmp_path / "state", state.State(1, 3, {}, optimizer.state_dict()), config)
    with torch.no_grad():
        resumed.copy_(ours)
    again = create(resumed)
    load_state(again, state.read(tmp_path / "state", config).steps)
    step(ours, optimizer)
    step(resumed, again)
    assert torch.equal(resumed, ours)
    assert lines == []
