"""Models in memory: loaded once, evicted when nobody uses them, and never too many."""

import threading

import pytest

from gpu_worker.resident import Resident


class Loads:
    """Loads that a test lets happen."""

    def __init__(self, max_models: int) -> None:
        self.loaded = threading.Semaphore(0)
        self.names: list[str] = []
        self.resident: Resident[str] = Resident(max_models, self.loaded.release)

    def take(self, name: str) -> str | None:
        return self.resident.take((name,), lambda: self._load(name))

    def keep(self, name: str) -> BaseException | None:
        return self.resident.keep((name,), lambda: self._load(name))

    def _load(self, name: str) -> str:
        self.names.append(name)
        if name == "broken":
            raise ValueError(name)
        return f"models of {name}"

    def take_in_the_end(self, name: str) -> str | None:
        found = self.take(name)
        if found is None and (name,) in self.resident:
            self.loaded.acquire(timeout=120)
            found = self.take(name)
        return found


def test_models_are_loaded_once_and_stay() -> None:
    loads = Loads(2)
    assert loads.take("a") is None
    assert loads.loaded.acquire(timeout=120)
    assert loads.take("a") == loads.take("a") == "models of a"
    assert loads.names == ["a"]
    assert loads.resident.keys == ("a",)
    loads.resident.close()


def test_the_least_recently_used_goes_but_never_one_in_use() -> None:
    loads = Loads(2)
    for name in "aba":
        assert loads.take_in_the_end(name)
    assert loads.take("c") is None
    assert ("c",) not in loads.resident  # both are in use
    loads.resident.give_back(("a",))
    assert loads.take("c") is None  # `a` has a second user
    loads.resident.give_back(("a",))
    loads.resident.give_back(("b",))
    assert loads.take_in_the_end("c") == "models of c"
    assert sorted(loads.resident.keys) == ["a", "c"]
    assert loads.names == ["a", "b", "c"]
    loads.resident.close()


def test_a_load_that_fails_tells_whoever_wants_the_models_and_is_tried_again() -> None:
    loads = Loads(1)
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            loads.take_in_the_end("broken")
    assert loads.take_in_the_end("a") == "models of a"
    assert loads.names == ["broken", "broken", "a"]
    loads.resident.close()


def test_pinned_models_come_without_being_asked_for_and_make_room_last() -> None:
    loads = Loads(2)
    loads.resident.pinned = frozenset([("a",)])
    assert loads.keep("a") is None
    assert loads.loaded.acquire(timeout=30)
    for name in "bc":
        assert loads.take_in_the_end(name)
        loads.resident.give_back((name,))
    assert sorted(loads.resident.keys) == ["a", "c"]  # `a` is the least recently used, and stays
    loads.take_in_the_end("c")
    assert loads.take_in_the_end("d")  # there is no other room
    assert sorted(loads.resident.keys) == ["c", "d"]
    assert loads.keep("a") is None
    assert ("a",) not in loads.resident  # both are in use
    loads.resident.give_back(("c",))
    assert loads.keep("a") is None
    assert ("a",) in loads.resident
    loads.resident.close()


def test_pinned_models_do_not_drive_each_other_out_and_one_that_is_broken_says_so() -> None:
    loads = Loads(1)
    loads.resident.pinned = frozenset([("broken",), ("a",), ("b",)])
    assert loads.keep("broken") is None
    assert loads.loaded.acquire(timeout=30)
    assert str(loads.keep("broken")) == "broken"
    assert loads.keep("a") is None
    assert loads.loaded.acquire(timeout=30)
    for name in "ab":
        assert loads.keep(name) is None
    assert loads.resident.keys == ("a",)
    assert loads.names == ["broken", "a"]
    loads.resident.close()
