"""Models in memory: which are here, which are being loaded, which must go. Knows keys and counts, nothing of torch.

Loading has a thread of its own, so that a checkpoint comes in while others tick.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

M = TypeVar("M")
Key = tuple[str, ...]


@dataclass
class _Entry(Generic[M]):
    models: Future[M]
    num_users: int = 0


class Resident(Generic[M]):
    """At most `max_models` at a time, the least recently used go first; what is in use is never evicted. Belongs to one
    thread; `on_loaded` is called in another whenever a load has ended."""

    def __init__(self, max_models: int, on_loaded: Callable[[], None]) -> None:
        self._max_models = max_models
        self._on_loaded = on_loaded
        self._entries: OrderedDict[Key, _Entry[M]] = OrderedDict()
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self.pinned: frozenset[Key] = frozenset()  # these make room last

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the single files behind the models that are here."""
        return tuple({name for key, entry in self._entries.items() if entry.models.done() for name in key})

    def take(self, key: Key, load: Callable[[], M], may_exceed: bool = False) -> M | None:
        """The models, in use until given back. None: they are not here; their load was begun if there was a place, or
        without one if it may exceed the bound.

        Raises:
            Whatever the load raised.
        """
        entry = self._entries.get(key)
        if entry is None:
            self._begin(key, load, may_exceed)
            return None
        if not entry.models.done():
            return None
        if entry.models.exception() is not None:
            del self._entries[key]
        models = entry.models.result()
        entry.num_users += 1
        self._entries.move_to_end(key)
        return models

    def keep(self, key: Key, load: Callable[[], M]) -> BaseException | None:
        """Begins to load pinned models, unless another pinned one would have to go. Answers why a load has failed."""
        entry = self._entries.get(key)
        if entry is None:
            self._begin(key, load, may_exceed=False, spared=self.pinned)
        elif entry.models.done() and (failure := entry.models.exception()) is not None:
            del self._entries[key]
            return failure
        return None

    def give_back(self, key: Key) -> None:
        """Ends one use."""
        self._entries[key].num_users -= 1

    def __contains__(self, key: Key) -> bool:
        """Whether these models are here or on their way."""
        return key in self._entries

    def close(self) -> None:
        """Waits for the load on its way and ends the thread."""
        self._loader.shutdown(cancel_futures=True)

    def _begin(self, key: Key, load: Callable[[], M], may_exceed: bool, spared: frozenset[Key] = frozenset()) -> None:
        unused = [
            other
            for other, entry in self._entries.items()
            if not entry.num_users and entry.models.done() and other not in spared
        ]
        unused.sort(key=self.pinned.__contains__)
        while len(self._entries) >= self._max_models and unused:
            del self._entries[unused.pop(0)]
        if len(self._entries) < self._max_models or may_exceed:
            self._entries[key] = entry = _Entry(self._loader.submit(load))
            entry.models.add_done_callback(lambda _: self._on_loaded())
