"""Who runs next."""

from gpu_worker.batch import Batch


def test_runs_go_one_after_the_other_in_order_of_arrival() -> None:
    batch: Batch[str] = Batch()
    assert batch.next() is None
    batch.add("a")
    batch.add("b")
    assert [batch.next(), batch.next()] == ["a", "a"]
    assert batch.remove("a")
    assert batch.next() == "b"
    assert len(batch) == 1


def test_a_waiting_run_can_be_removed_once() -> None:
    batch: Batch[str] = Batch()
    batch.add("a")
    batch.add("b")
    batch.next()
    assert batch.remove("b")
    assert not batch.remove("b")
    assert batch.next() == "a"


def test_runs_that_share_the_gpu_take_turns_and_a_free_place_goes_to_the_longest_wait() -> None:
    batch: Batch[str] = Batch(max_running=2)
    for run in "abc":
        batch.add(run)
    assert [batch.next() for _ in range(4)] == ["a", "b", "a", "b"]
    batch.remove("a")
    assert sorted(str(batch.next()) for _ in range(4)) == ["b", "b", "c", "c"]
