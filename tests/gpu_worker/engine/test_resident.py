"""Models in memory: loaded once, evicted when nobody uses them, brought back from copies, and never too many."""

import threading
from collections.abc import Iterator

import pytest

from gpu_worker.engine.resident import Resident


class Model:
    """Ten bytes that know where they have been."""

    num_bytes = 10

    def __init__(self, name: str) -> None:
        self.name = name
        self.moves: list[str] = []

    def enter(self) -> None:
        self.moves.append("enter")

    def leave(self) -> None:
        self.moves.append("leave")

    def forget(self) -> None:
        self.moves.append("forget")


class Loads:
    """Loads that a test waits for."""

    def __init__(self, max_bytes: int, max_host_bytes: int = 0) -> None:
        self.loaded = threading.Semaphore(0)
        self.names: list[str] = []
        self.resident: Resident[Model] = Resident(max_bytes, max_host_bytes, self.loaded.release)

    def take(self, name: str, may_exceed: bool = False) -> Model | None:
        return self.resident.take((name,), lambda: self._load(name), 10, may_exceed)

    def keep(self, name: str) -> BaseException | None:
        return self.resident.keep((name,), lambda: self._load(name), 10)

    def _load(self, name: str) -> Model:
        self.names.append(name)
        if name == "broken":
            raise ValueError(name)
        return Model(name)

    def take_in_the_end(self, name: str) -> Model:
        for _ in range(4):
            if (found := self.take(name)) is not None:
                return found
            assert self.loaded.acquire(timeout=120)
        raise AssertionError("it is not coming")

    def use(self, name: str) -> Model:
        """Takes it and gives it back."""
        found = self.take_in_the_end(name)
        self.resident.give_back((name,))
        return found


@pytest.fixture
def loads() -> Iterator[Loads]:
    found = Loads(20)
    yield found
    found.resident.close()


@pytest.fixture
def copied() -> Iterator[Loads]:
    """Room for one on the device and for two copies."""
    found = Loads(10, 20)
    yield found
    found.resident.close()


def test_models_are_loaded_once_and_stay(loads: Loads) -> None:
    assert loads.take("a") is None
    assert loads.loaded.acquire(timeout=120)
    first, second = loads.take("a"), loads.take("a")
    assert first is second is not None
    assert loads.names == ["a"]
    assert loads.resident.keys == ("a",)
    assert loads.resident.here == [first]


def test_the_least_recently_used_goes_but_never_one_in_use(loads: Loads) -> None:
    for name in "aba":
        loads.take_in_the_end(name)
    assert loads.take("c") is None
    assert ("c",) not in loads.resident  # both are in use
    loads.resident.give_back(("a",))
    assert loads.take("c") is None  # `a` has a second user
    loads.resident.give_back(("a",))
    loads.resident.give_back(("b",))
    assert loads.take_in_the_end("c")
    assert sorted(loads.resident.keys) == ["a", "c"]
    assert loads.names == ["a", "b", "c"]


def test_a_load_that_fails_tells_whoever_wants_the_models_and_is_tried_again(loads: Loads) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            loads.take_in_the_end("broken")
    assert loads.take_in_the_end("a")
    assert loads.names == ["broken", "broken", "a"]


def test_a_failure_that_nobody_asked_for_takes_no_room_and_fails_nobody_else(loads: Loads) -> None:
    loads.use("a")
    assert loads.take("broken") is None
    assert loads.loaded.acquire(timeout=120)
    assert loads.resident.keys == ("a",)
    failures = loads.resident.failures
    assert failures == {("broken",)}
    loads.resident.dismiss(failures)
    loads.take_in_the_end("a"), loads.take_in_the_end("b")
    assert loads.take("broken") is None  # it waits for a place, and hears nothing old


def test_models_larger_than_the_bound_come_alone() -> None:
    loads = Loads(5)
    loads.use("a")
    loads.use("b")
    assert loads.resident.keys == ("b",)
    loads.resident.close()


def test_what_may_exceed_the_bound_waits_for_no_place(copied: Loads) -> None:
    copied.use("a")
    assert copied.take_in_the_end("b")
    assert copied.take("a") is None  # whose copy is there
    assert copied.take("a", may_exceed=True) is None
    assert copied.loaded.acquire(timeout=120)
    assert copied.take("a")
    assert len(copied.resident.here) == 2


def test_what_leaves_the_device_comes_back_from_its_copy(copied: Loads) -> None:
    first = copied.use("a")
    copied.use("b")
    assert first.moves == ["enter", "leave"]
    assert sorted(copied.resident.keys) == ["a", "b"]
    assert copied.use("a") is first
    assert first.moves == ["enter", "leave", "enter"]
    assert copied.names == ["a", "b"]


def test_copies_beyond_the_bound_are_given_up_and_read_again(copied: Loads) -> None:
    first = copied.use("a")
    copied.use("b")
    copied.use("c")
    assert first.moves == ["enter", "leave", "forget"]
    assert sorted(copied.resident.keys) == ["b", "c"]
    copied.use("a")
    assert copied.names == ["a", "b", "c", "a"]


def test_the_next_models_are_read_while_the_device_has_no_room(copied: Loads) -> None:
    assert copied.take_in_the_end("a")
    assert copied.take("b") is None
    assert copied.loaded.acquire(timeout=120)
    assert copied.take("b") is None  # it is in the host's memory now
    assert copied.names == ["a", "b"]
    assert ("b",) not in copied.resident
    copied.resident.give_back(("a",))
    assert copied.take_in_the_end("b").moves == ["enter"]
    assert copied.names == ["a", "b"]


def test_all_that_nobody_uses_can_be_evicted(loads: Loads) -> None:
    unused = loads.use("a")
    loads.take_in_the_end("b")
    assert loads.resident.evict_unused()
    assert unused.moves == ["enter", "leave"]
    assert loads.resident.keys == ("b",)
    assert not loads.resident.evict_unused()


def test_memory_stays_bounded_over_many_switches(copied: Loads) -> None:
    for index in range(60):
        copied.use("abc"[index % 3])
        assert len(copied.resident.here) == 1
        assert len(copied.resident.keys) <= 2


def test_pinned_models_come_without_being_asked_for_and_make_room_last(loads: Loads) -> None:
    loads.resident.pinned = frozenset([("a",)])
    assert loads.keep("a") is None
    assert loads.loaded.acquire(timeout=120)
    for name in "bc":
        loads.use(name)
    assert sorted(loads.resident.keys) == ["a", "c"]  # `a` is the least recently used, and stays
    loads.take_in_the_end("c")
    assert loads.take_in_the_end("d")  # there is no other room
    assert sorted(loads.resident.keys) == ["c", "d"]
    assert loads.keep("a") is None
    assert ("a",) not in loads.resident  # both are in use
    loads.resident.give_back(("c",))
    assert loads.keep("a") is None
    assert ("a",) in loads.resident


def test_pinned_models_do_not_drive_each_other_out_and_one_that_is_broken_says_so() -> None:
    loads = Loads(10)
    loads.resident.pinned = frozenset([("broken",), ("a",), ("b",)])
    assert loads.keep("broken") is None
    assert loads.loaded.acquire(timeout=120)
    assert str(loads.keep("broken")) == "broken"
    assert loads.keep("a") is None
    assert loads.loaded.acquire(timeout=120)
    for name in "ab":
        assert loads.keep(name) is None
    assert loads.resident.keys == ("a",)
    assert loads.names == ["broken", "a"]
