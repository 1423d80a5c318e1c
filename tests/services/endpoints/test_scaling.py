"""The scaling policy: examples of its sentences, and what holds for every load."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from services.endpoints.scaling import Load, Scale, ScalingPolicy, decide, needed_workers, seconds_until_due
from tests.bench.scaling import day_table

POLICY = ScalingPolicy()
START = datetime(2026, 1, 1, tzinfo=UTC)
OUT, IN = timedelta(seconds=POLICY.out_seconds), timedelta(seconds=POLICY.in_seconds)
TICK = timedelta(seconds=1)

counts = st.integers(0, 50)
bounds = st.tuples(st.integers(0, 20), st.integers(0, 20)).map(lambda pair: (min(pair), max(*pair, 1)))
times = st.one_of(st.none(), st.integers(0, 2000).map(lambda seconds: START - timedelta(seconds=seconds)))
loads = st.builds(Load, num_queued=counts, work_seconds=st.one_of(st.none(), st.floats(0, 1e5)))


@st.composite
def scales(draw: st.DrawFn) -> Scale:
    num_workers, since = draw(counts), draw(times)
    if draw(st.booleans()):
        return Scale(num_workers, need_since=since)
    return Scale(num_workers, surplus_since=since, surplus_peak=draw(st.integers(0, max(0, num_workers - 1))))


def after(scale: Scale, needs: list[tuple[timedelta, int]], num_min: int = 0, num_max: int = 10) -> Scale:
    """What is decided when so many workers are needed at these times."""
    for passed, num_needed in needs:
        scale = decide(scale, num_needed, num_min, num_max, START + passed, POLICY)
    return scale


NOW = timedelta()


@pytest.mark.parametrize(
    ("num_jobs", "work_seconds", "is_real_time", "num_workers"),
    [
        (0, None, False, 0),
        (1, None, False, 1),
        (3, None, False, 1),
        (4, None, False, 2),
        (7, None, False, 3),
        (5, None, True, 1),
        (6, None, True, 2),
        (6, 600.0, False, 6),  # long jobs: a worker each, not one for every second of work
        (6, 90.0, False, 3),
        (6, 90.0, True, 2),
        (300, 30.0, False, 1),  # very short ones
        (2, 0.0, False, 1),
        (0, 0.0, False, 0),
    ],
)
def test_needed_workers_are_the_backlog_over_the_target(
    num_jobs: int, work_seconds: float | None, is_real_time: bool, num_workers: int
) -> None:
    assert needed_workers(Load(num_queued=num_jobs, work_seconds=work_seconds), is_real_time, POLICY) == num_workers


def test_a_pool_grows_after_the_time_of_need_and_not_before() -> None:
    assert after(Scale(1), [(NOW, 3), (OUT - TICK, 3)]).num_workers == 1
    assert after(Scale(1), [(NOW, 3), (OUT, 4)]) == Scale(4)


def test_a_moment_without_need_begins_the_time_anew() -> None:
    assert after(Scale(1), [(NOW, 3), (OUT - TICK, 1), (OUT, 3)]).num_workers == 1


def test_a_pool_without_workers_grows_at_once() -> None:
    assert after(Scale(0), [(NOW, 2)]) == Scale(2)


def test_an_idle_pool_shrinks_to_its_minimum_after_the_idle_time_and_not_before() -> None:
    assert after(Scale(4), [(NOW, 0), (IN - TICK, 0)]).num_workers == 4
    assert after(Scale(4), [(NOW, 0), (IN, 0)]) == Scale(0)
    assert after(Scale(4), [(NOW, 0), (IN, 0)], num_min=2) == Scale(2)


def test_a_pool_shrinks_to_the_most_that_it_needed_meanwhile() -> None:
    assert after(Scale(5), [(NOW, 0), (TICK, 3), (2 * TICK, 1), (IN, 0)]) == Scale(3, surplus_since=START + IN)


def test_bounds_hold_at_once() -> None:
    assert decide(Scale(5), 5, 0, 2, START, POLICY) == Scale(2)
    assert decide(Scale(1), 4, 4, 6, START, POLICY) == Scale(4)


@given(load=loads, is_real_time=st.booleans())
def test_there_is_a_worker_if_and_only_if_there_is_a_job_and_never_more_than_jobs(
    load: Load, is_real_time: bool
) -> None:
    num_workers = needed_workers(load, is_real_time, POLICY)
    assert (num_workers > 0) == (load.num_jobs > 0)
    assert num_workers <= load.num_jobs


@given(num_jobs=counts, more=counts, seconds=st.floats(0, 1e5), longer=st.floats(0, 1e5), is_real_time=st.booleans())
def test_more_work_never_needs_fewer_workers(
    num_jobs: int, more: int, seconds: float, longer: float, is_real_time: bool
) -> None:
    less = Load(num_queued=num_jobs, work_seconds=seconds)
    much = Load(num_queued=num_jobs + more, work_seconds=seconds + longer)
    assert needed_workers(less, is_real_time, POLICY) <= needed_workers(much, is_real_time, POLICY)


@given(before=scales(), num_needed=counts, limits=bounds)
@example(before=Scale(2, surplus_since=START - IN, surplus_peak=1), num_needed=0, limits=(0, 2))
def test_a_decision_is_within_bounds_and_asking_again_changes_nothing(
    before: Scale, num_needed: int, limits: tuple[int, int]
) -> None:
    once = decide(before, num_needed, *limits, START, POLICY)
    assert limits[0] <= once.num_workers <= limits[1]
    assert decide(once, num_needed, *limits, START, POLICY) == once


@given(before=scales(), num_needed=counts)
def test_a_pool_never_grows_beyond_what_is_needed_nor_shrinks_below_it(before: Scale, num_needed: int) -> None:
    after = decide(before, num_needed, 0, 50, START, POLICY)
    if after.num_workers > before.num_workers:
        assert after.num_workers == num_needed
    elif after.num_workers < before.num_workers:
        assert after.num_workers >= num_needed


@given(before=scales(), num_needed=counts, limits=bounds)
def test_a_steady_load_gets_what_it_needs_and_then_nothing_changes(
    before: Scale, num_needed: int, limits: tuple[int, int]
) -> None:
    scale, now = before, START
    for _ in range(6):  # at most: the bounds, a peak of before, the need
        scale = decide(scale, num_needed, *limits, now, POLICY)
        now += timedelta(seconds=seconds_until_due(scale, now, POLICY) or 0)
    assert scale == Scale(min(max(num_needed, limits[0]), limits[1]))
    assert decide(scale, num_needed, *limits, now + IN, POLICY) == scale


@given(before=scales(), num_needed=counts)
def test_nothing_is_decided_before_it_is_due(before: Scale, num_needed: int) -> None:
    scale = decide(before, num_needed, 0, 50, START, POLICY)
    due = seconds_until_due(scale, START, POLICY)
    if due is not None and due > 0.001:
        later = decide(scale, num_needed, 0, 50, START + timedelta(seconds=due - 0.001), POLICY)
        assert later.num_workers == scale.num_workers


def test_the_bench_has_the_same_day_under_the_policy_and_its_neighbours() -> None:
    table, day = day_table(num_endpoints=5, hours=0.1)
    assert table.row_count == len(["ideal", "the default", "in sooner", "out at once", "largest"])
    assert day.work_hours > 0
