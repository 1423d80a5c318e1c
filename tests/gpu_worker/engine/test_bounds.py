"""How large a UNet call may be."""

from gpu_worker.engine.bounds import Bound


def test_the_bound_is_halved_until_a_single_row_is_left() -> None:
    bound = Bound(1000)
    assert bound.shrink(num_rows=8, row_pixels=10)  # far below the bound, but too much all the same
    assert bound.pixels == 40
    assert bound.shrink(num_rows=8, row_pixels=10)
    assert bound.max_rows(row_pixels=10) == 2
    assert bound.shrink(num_rows=2, row_pixels=10)
    assert not bound.shrink(num_rows=2, row_pixels=10)
    assert bound.max_rows(row_pixels=10) == 1


def grown(bound: Bound) -> int:
    """Calls as large as the bound until it grows."""
    before, num_calls = bound.pixels, 0
    while bound.pixels == before:
        bound.fits(bound.max_rows(10), 10)
        num_calls += 1
    return num_calls


def test_the_bound_grows_back_after_calls_that_it_cut_short() -> None:
    bound = Bound(80)
    bound.shrink(8, 10)
    for _ in range(10_000):
        bound.fits(1, 10)  # small calls say nothing of large ones
    assert bound.pixels == 40
    while bound.pixels < 80:
        grown(bound)
    assert bound.pixels == 80


def test_growing_is_slower_after_it_was_too_early() -> None:
    bound = Bound(80)
    bound.shrink(8, 10)
    first = grown(bound)
    bound.shrink(bound.max_rows(10), 10)
    assert grown(bound) == 2 * first


def test_memory_that_others_take_and_leave_moves_a_bound_that_was_not_halved() -> None:
    bound = Bound(80)
    bound.allow(60)
    assert bound.pixels == 60
    bound.allow(70)
    assert bound.pixels == 70
    bound.shrink(7, 10)
    bound.allow(80)
    assert bound.pixels == 30  # that it did not fit is what counts
    bound.allow(20)
    assert bound.pixels == 20
