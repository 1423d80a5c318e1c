"""The state of a training as a file: to which configurations it belongs."""

from pathlib import Path
from typing import Any

import pytest

from gpu_worker.job import JobError
from gpu_worker.trainer import state
from services.common.payloads.training import Training, check_training

KEYS: dict[str, Any] = {
    "network_module": "lycoris.kohya", "network_args": ["algo=lokr", "factor=4", "conv_dim=2"], "seed": 5,
}  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A state of the keys."""
    found = tmp_path / "state.pt"
    state.write(found, state.State(1, 4, {}, {}), check_training(KEYS))
    return found


def test_a_state_belongs_to_its_keys_in_any_order(path: Path) -> None:
    again = dict(reversed(KEYS.items())) | {"network_args": KEYS["network_args"][::-1]}  # as a stream's maps have them
    assert state.read(path, check_training(again)) == state.State(1, 4, {}, {})


def test_folders_and_keys_without_effect_may_differ(path: Path) -> None:
    keys = {"output_dir": "elsewhere", "xformers": True, "mystery": 1, "network_dropout": 0.0}
    assert state.read(path, check_training(KEYS | keys)).step == 4


def test_a_state_of_an_earlier_version_is_read_by_one_that_knows_more_keys(path: Path) -> None:
    class Later(Training):
        new_key: int = 0

    assert state.read(path, Later.model_validate(KEYS)).step == 4
    with pytest.raises(JobError, match="belongs to a training with another configuration"):
        state.read(path, Later.model_validate(KEYS | {"new_key": 1}))
