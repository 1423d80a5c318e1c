"""Who gets which GPU."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.endpoints.cluster.gpus import Shares, find_gpus

GPUS = ("0", "1", "2")


@pytest.mark.parametrize(
    ("taken", "chosen"),
    [
        ((), "0"),
        (("0",), "1"),
        (("0", "1"), "2"),
        (("0", "2"), "1"),
        (("0", "1", "2"), "0"),
        (("0", "0", "2", None), "1"),
    ],
)
def test_a_worker_gets_the_gpu_with_the_fewest_workers(taken: tuple[str | None, ...], chosen: str) -> None:
    assert Shares(GPUS, workers=taken).for_worker() == chosen


@given(num_gpus=st.integers(1, 8), num_workers=st.integers(0, 40))
def test_workers_that_come_one_after_another_are_spread_evenly(num_gpus: int, num_workers: int) -> None:
    shares = Shares(tuple(str(index) for index in range(num_gpus)))
    for _ in range(num_workers):
        shares = replace(shares, workers=(*shares.workers, shares.for_worker()))
    numbers = [shares.workers.count(gpu) for gpu in shares.gpus]
    assert max(numbers) - min(numbers) <= 1


@pytest.mark.parametrize(
    ("shares", "for_worker", "for_task"),
    [
        (Shares(GPUS, workers=("0",), tasks=("1",)), "2", "2"),
        (Shares(GPUS, workers=("0", "2"), tasks=("1",)), "0", None),
        (Shares(GPUS, tasks=GPUS), None, None),
        (Shares(GPUS, workers=("0",), num_waiting_workers=1), "1", "1"),
        (Shares(GPUS, workers=("0",), num_waiting_workers=2), "1", None),
        (Shares(GPUS, workers=("0",), num_waiting_workers=2, num_waiting_tasks=1, tasks_first=True), "2", "1"),
        (Shares(GPUS, workers=("0", "1", "2"), num_waiting_tasks=1, tasks_first=True), "1", None),
        (Shares(("0",), workers=("0",), num_waiting_tasks=1, tasks_first=True), None, None),
        (Shares(("0",), num_waiting_workers=1, num_waiting_tasks=1, tasks_first=True), None, "0"),
        (Shares(("0",), num_waiting_workers=1, num_waiting_tasks=1), "0", None),
    ],
)
def test_a_task_has_its_gpu_for_itself(shares: Shares, for_worker: str | None, for_task: str | None) -> None:
    assert (shares.for_worker(), shares.for_task()) == (for_worker, for_task)


holders = st.lists(st.sampled_from(GPUS), max_size=5).map(tuple)
any_shares = st.builds(
    Shares,
    gpus=st.just(GPUS),
    workers=holders,
    tasks=st.sets(st.sampled_from(GPUS)).map(lambda found: tuple(sorted(found))),
    num_waiting_workers=st.integers(0, 4),
    num_waiting_tasks=st.integers(0, 4),
    tasks_first=st.booleans(),
)


@given(shares=any_shares)
def test_whoever_goes_first_no_gpu_is_shared_with_a_task_and_a_free_one_goes_to_somebody(shares: Shares) -> None:
    assert shares.for_worker() not in shares.tasks
    assert shares.for_task() not in {*shares.tasks, *shares.workers} - {None}
    free = set(GPUS) - set(shares.workers) - set(shares.tasks)
    if free and shares.num_waiting_workers and shares.num_waiting_tasks:
        assert shares.for_worker() in free or shares.for_task() in free
    if not shares.tasks_first:
        assert shares.kept_for_tasks() == []


@given(shares=any_shares)
def test_where_tasks_go_first_each_finds_a_gpu_once_the_workers_have_left(shares: Shares) -> None:
    first = replace(shares, tasks_first=True)
    kept = first.kept_for_tasks()
    assert len(kept) == min(first.num_waiting_tasks, len(set(GPUS) - set(first.tasks)))
    left = tuple(gpu for gpu in first.workers if gpu not in kept)
    assert not kept or replace(first, workers=left).for_task() is not None


@pytest.mark.parametrize(
    ("visible", "gpus"), [("0, 2", ["0", "2"]), ("GPU-5f1a", ["GPU-5f1a"]), ("", []), ("-1", []), ("0,-1,1", ["0"])]
)
def test_gpus_that_were_chosen_outside_are_kept_to(
    monkeypatch: pytest.MonkeyPatch, visible: str, gpus: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_gpus() == gpus
