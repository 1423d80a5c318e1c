"""Who takes the next tick."""

from gpu_worker.batch import Batch


def test_runs_of_a_group_tick_together_from_the_moment_they_come() -> None:
    batch: Batch[str] = Batch(max_pixels=100)
    assert batch.next() == []
    batch.place("a", "group", 10)
    assert batch.next() == ["a"]
    batch.place("b", "group", 10)
    assert batch.next() == ["a", "b"]
    assert batch.remove("a")
    assert not batch.remove("a")
    assert batch.next() == ["b"]
    assert "b" in batch
    assert len(batch) == 1


def test_a_tick_has_no_more_pixels_than_the_bound_and_nobody_is_overtaken() -> None:
    batch: Batch[str] = Batch(max_pixels=100)
    for run, num_pixels in (("a", 60), ("large", 90), ("c", 10)):
        batch.place(run, "group", num_pixels)
    assert batch.next() == ["a"]
    batch.remove("a")
    assert batch.next() == ["large", "c"]


def test_a_run_above_the_bound_ticks_alone() -> None:
    batch: Batch[str] = Batch(max_pixels=100)
    batch.place("huge", "group", 1000)
    batch.place("b", "group", 1)
    assert batch.next() == ["huge"]


def test_groups_never_share_a_tick_and_get_equal_time() -> None:
    batch: Batch[str] = Batch(max_pixels=100, slice_seconds=1)
    for run in "abc":
        batch.place(run, "small", 10)
    batch.place("x", "large", 10)
    seconds = {"a": 0.0, "x": 0.0}
    for _ in range(200):
        runs = batch.next()
        assert runs in (["a", "b", "c"], ["x"])
        cost = 0.5 if "a" in runs else 2.0
        seconds[runs[0]] += cost
        batch.spent(cost)
    assert abs(seconds["a"] - seconds["x"]) <= 2


def test_a_group_keeps_the_gpu_for_its_slice() -> None:
    batch: Batch[str] = Batch(max_pixels=100, slice_seconds=1)
    batch.place("a", "one", 1)
    batch.place("b", "two", 1)
    order = []
    for _ in range(12):
        order += batch.next()
        batch.spent(0.25)
    assert "".join(order) == "aaaabbbbaaaa"


def test_a_group_that_comes_late_is_owed_nothing_for_the_time_before() -> None:
    batch: Batch[str] = Batch(max_pixels=100, slice_seconds=0)
    batch.place("old", "one", 1)
    batch.next()
    batch.spent(1000)
    batch.place("new", "two", 1)
    order = []
    for _ in range(6):
        order += batch.next()
        batch.spent(1)
    assert sorted(order) == ["new"] * 3 + ["old"] * 3


def test_an_exclusive_run_ticks_alone_in_its_turn() -> None:
    batch: Batch[str] = Batch(max_pixels=100, slice_seconds=0)
    batch.place("a", "group", 1)
    batch.place("alone", "group", 1, exclusive=True)
    batch.place("b", "group", 1)
    ticks = []
    for _ in range(4):
        ticks.append(batch.next())
        batch.spent(1)
    assert ticks == [["a", "b"], ["alone"], ["a", "b"], ["alone"]]


def test_the_bound_is_halved_until_a_single_row_is_left() -> None:
    batch: Batch[str] = Batch(max_pixels=1000)
    assert batch.shrink(num_rows=8, row_pixels=10)  # far below the bound, but too much all the same
    assert batch.max_pixels == 40
    assert batch.shrink(num_rows=8, row_pixels=10)
    assert batch.max_rows(row_pixels=10) == 2
    assert batch.shrink(num_rows=2, row_pixels=10)
    assert not batch.shrink(num_rows=2, row_pixels=10)
    assert batch.max_rows(row_pixels=10) == 1
