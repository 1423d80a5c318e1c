"""Which GPU a worker gets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.endpoints.cluster.local import choose_gpu, find_gpus


@pytest.mark.parametrize(
    ("taken", "chosen"),
    [
        ([], "0"),
        (["0"], "1"),
        (["0", "1"], "2"),
        (["0", "2"], "1"),
        (["0", "1", "2"], "0"),
        (["0", "0", "2", None], "1"),
    ],
)
def test_a_worker_gets_the_gpu_with_the_fewest_workers(taken: list[str | None], chosen: str) -> None:
    assert choose_gpu(["0", "1", "2"], taken) == chosen


@given(num_gpus=st.integers(1, 8), num_workers=st.integers(0, 40))
def test_workers_that_come_one_after_another_are_spread_evenly(num_gpus: int, num_workers: int) -> None:
    gpus = [str(index) for index in range(num_gpus)]
    taken: list[str] = []
    for _ in range(num_workers):
        taken.append(choose_gpu(gpus, taken))
    numbers = [taken.count(gpu) for gpu in gpus]
    assert max(numbers) - min(numbers) <= 1


@pytest.mark.parametrize(("visible", "gpus"), [("0,2", ["0", "2"]), ("GPU-5f1a", ["GPU-5f1a"]), ("", [])])
def test_gpus_that_were_chosen_outside_are_kept_to(
    monkeypatch: pytest.MonkeyPatch, visible: str, gpus: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_gpus() == gpus
