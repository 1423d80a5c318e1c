"""What the object store's proxy remembers: copies, for a time, and not without bound."""

import pytest

from deploy.local import swift_cache
from deploy.local.swift_cache import ProcessCache


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in seconds, that the cache sees."""
    seconds = [1000.0]
    monkeypatch.setattr(swift_cache, "monotonic", lambda: seconds[0])
    return seconds


def test_a_value_is_there_until_its_time_is_over(clock: list[float]) -> None:
    cache = ProcessCache()
    cache.set("container/a/b", {"status": 204}, time=60)
    clock[0] += 59.9
    assert cache.get("container/a/b") == {"status": 204}
    clock[0] += 0.2
    assert cache.get("container/a/b") is None


def test_what_is_done_to_an_answer_does_not_change_the_next(clock: list[float]) -> None:
    cache = ProcessCache()
    value = {"meta": {"x": "1"}}
    cache.set("account/a", value, time=60)
    value["meta"]["x"] = "2"
    cache.get("account/a")["meta"]["x"] = "3"
    assert cache.get("account/a") == {"meta": {"x": "1"}}


def test_a_deleted_value_is_gone_and_an_unknown_one_was_never_there(clock: list[float]) -> None:
    cache = ProcessCache()
    cache.set("account/a", {}, time=60)
    cache.delete("account/a")
    cache.delete("account/b")
    assert cache.get("account/a") is cache.get("account/b") is None


def test_names_without_end_take_no_memory_without_end(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swift_cache, "_MAX_ENTRIES", 3)
    cache = ProcessCache()
    for number in range(10):
        cache.set(f"container/a/{number}", {}, time=60)
    assert cache.get("container/a/9") == {}
    assert sum(cache.get(f"container/a/{number}") is not None for number in range(10)) <= 3
