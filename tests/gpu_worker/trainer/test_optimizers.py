"""The course of the learning rates."""

import pytest
import torch

from gpu_worker.trainer.optimizers import create_schedule
from services.common.payloads.training import check_training


@pytest.mark.parametrize(("given", "num_steps"), [(3, 3), (0.35, 3), (0.99, 9), (1, 1), (0, 0)])
def test_below_1_warm_up_is_a_part_of_all_steps_cut_to_whole_ones_as_in_kohya(given: float, num_steps: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    config = check_training({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": given})
    schedule = create_schedule(config, optimizer, num_steps=10)
    rates = []
    for _ in range(10):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([2 * step / num_steps if step < num_steps else 2 for step in range(10)])
