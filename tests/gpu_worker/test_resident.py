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
        def load() -> str:
            self.names.append(name)
            if name == "broken":
                raise ValueError(name)
            return f"models of {name}"

        return self.resident.take((name,), load)

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
