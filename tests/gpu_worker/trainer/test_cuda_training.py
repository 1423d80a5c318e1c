"""Whole trainings on a GPU, where the machine has one: with each optimizer, stopped and gone on with.

Needs none of the other tests' parts, as tests/gpu_worker/test_cuda.py.
"""

import pytest
import torch

from services.common.payloads.training import OPTIMIZERS
from tests.bench.training_whole import whole

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device on this machine"),
    pytest.mark.filterwarnings("ignore"),
]


ARGUMENTS = {"Adafactor": ["relative_step=False"]}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("mixed_precision", ["fp16", "bf16"])
def test_a_training_that_is_stopped_goes_on_from_its_epoch(mixed_precision: str, optimizer: str) -> None:
    # At this width a matrix has 4,096 numbers, from which on bitsandbytes keeps 8 bits of each.
    keys = {"optimizer_type": optimizer, "optimizer_args": ARGUMENTS.get(optimizer, []), "network_dim": 64}
    found = whole("cuda", mixed_precision, **keys)
    assert found["finite"]
    assert (found["steps"], found["resumed_at"]) == ([7, 8], 4)
    assert found["previews"] == 3
