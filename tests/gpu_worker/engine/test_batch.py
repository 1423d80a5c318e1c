"""Who takes the next tick."""

from gpu_worker.engine.batch import Batch
from gpu_worker.engine.bounds import Bound

BOUND = Bound(100)


def test_runs_of_a_group_tick_together_from_the_moment_they_come() -> None:
    batch: Batch[str] = Batch()
    assert batch.next() == []
    batch.place("a", "group", 10, BOUND)
    assert batch.next() == ["a"]
    batch.place("b", "group", 10, BOUND)
    assert batch.next() == ["a", "b"]
    assert batch.remove("a")
    assert not batch.remove("a")
    assert batch.next() == ["b"]
    assert "b" in batch
    assert len(batch) == 1


def test_a_tick_has_no_more_pixels_than_the_bound_and_nobody_is_overtaken() -> None:
    batch: Batch[str] = Batch()
    for run, num_pixels in (("a", 60), ("large", 90), ("c", 10)):
        batch.place(run, "group", num_pixels, BOUND)
    assert batch.next() == ["a"]
    batch.remove("a")
    assert batch.next() == ["large", "c"]


def test_a_run_above_the_bound_ticks_alone() -> None:
    batch: Batch[str] = Batch()
    batch.place("huge", "group", 1000, BOUND)
    batch.place("b", "group", 1, BOUND)
    assert batch.next() == ["huge"]


def test_groups_never_share_a_tick_and_get_equal_time() -> None:
    batch: Batch[str] = Batch(slice_seconds=1)
    for run in "abc":
        batch.place(run, "small", 10, BOUND)
    batch.place("x", "large", 10, BOUND)
    seconds = {"a": 0.0, "x": 0.0}
    for _ in range(200):
        runs = batch.next()
        assert runs in (["a", "b", "c"], ["x"])
        cost = 0.5 if "a" in runs else 2.0
        seconds[runs[0]] += cost
        batch.charge(batch.current, cost)
    assert abs(seconds["a"] - seconds["x"]) <= 2


def test_a_group_keeps_the_gpu_for_its_slice() -> None:
    batch: Batch[str] = Batch(slice_seconds=1)
    batch.place("a", "one", 1, BOUND)
    batch.place("b", "two", 1, BOUND)
    order = []
    for _ in range(12):
        order += batch.next()
        batch.charge(batch.current, 0.25)
    assert "".join(order) == "aaaabbbbaaaa"


def test_a_group_that_comes_late_is_owed_nothing_for_the_time_before() -> None:
    batch: Batch[str] = Batch(slice_seconds=0)
    batch.place("old", "one", 1, BOUND)
    batch.next()
    batch.charge(batch.current, 1000)
    batch.place("new", "two", 1, BOUND)
    order = []
    for _ in range(6):
        order += batch.next()
        batch.charge(batch.current, 1)
    assert sorted(order) == ["new"] * 3 + ["old"] * 3


def test_an_exclusive_run_ticks_alone_in_its_turn() -> None:
    batch: Batch[str] = Batch(slice_seconds=0)
    batch.place("a", "group", 1, BOUND)
    batch.place("alone", "group", 1, BOUND, exclusive=True)
    batch.place("b", "group", 1, BOUND)
    ticks = []
    for _ in range(4):
        ticks.append(batch.next())
        batch.charge(batch.current, 1)
    assert ticks == [["a", "b"], ["alone"], ["a", "b"], ["alone"]]


def test_groups_with_a_run_that_somebody_waits_for_go_first_and_at_once() -> None:
    batch: Batch[str] = Batch(slice_seconds=1)
    batch.place("a", "one", 1, BOUND)
    assert batch.next() == ["a"]
    batch.charge(batch.current, 0.1)
    batch.place("urgent", "two", 1, BOUND, is_urgent=True)
    batch.place("b", "two", 1, BOUND)
    for _ in range(50):
        assert batch.next() == ["urgent", "b"]
        batch.charge(batch.current, 0.1)
    batch.remove("urgent")
    batch.charge(batch.current, 1)  # the slice ends
    assert batch.next() == ["a"]


def test_among_runs_of_a_group_the_urgent_ones_have_the_places() -> None:
    batch: Batch[str] = Batch()
    for run in "ab":
        batch.place(run, "group", 50, BOUND)
    batch.place("urgent", "group", 50, BOUND, is_urgent=True)
    assert batch.next() == ["urgent", "a"]


def test_no_group_waits_for_ever_behind_urgent_ones() -> None:
    batch: Batch[str] = Batch(slice_seconds=1)
    batch.place("patient", "one", 1, BOUND)
    batch.place("urgent", "two", 1, BOUND, is_urgent=True)
    ticks = []
    for _ in range(60):
        ticks += batch.next()
        batch.charge(batch.current, 0.5)
    assert 2 <= ticks.count("patient") <= 6


def test_time_that_is_known_late_is_charged_to_the_group_that_had_it() -> None:
    batch: Batch[str] = Batch(slice_seconds=1)
    batch.place("a", "one", 1, BOUND)
    batch.place("b", "two", 1, BOUND)
    late = None
    order = []
    for _ in range(12):
        order += batch.next()
        if late is not None:
            batch.charge(late, 1)
        late = batch.current
    assert abs(order.count("a") - order.count("b")) <= 2
