"""Models in memory: which are here, which are being loaded, which must go. Knows keys and bytes, nothing of torch.

Two bounds: on what is on the device, and on the copies that stay in the host's memory, from where a model comes back
without being read again. Loading has a thread of its own, so that a checkpoint comes in while others tick.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Movable(Protocol):
    """What can be on the device, in the host's memory, or in both."""

    @property
    def num_bytes(self) -> int:
        """What it takes in either."""

    def enter(self) -> None:
        """Comes to the device, or stays; called in the loading thread."""

    def leave(self) -> None:
        """Leaves the device; nobody uses it."""

    def forget(self) -> None:
        """Gives up the host's copy."""


M = TypeVar("M", bound=Movable)
Key = tuple[str, ...]


@dataclass
class _Entry(Generic[M]):
    """`num_bytes` are an estimate until the load has ended. `is_here`: on the device, or on its way there."""

    models: Future[M]
    num_bytes: int
    is_here: bool
    has_copy: bool
    num_users: int = 0

    @property
    def is_loaded(self) -> bool:
        return self.models.done() and self.models.exception() is None


class Resident(Generic[M]):
    """At most `max_bytes` on the device and `max_host_bytes` of copies, the least recently used go first; what is in
    use is never evicted. A model that is too large comes alone.

    Belongs to one thread; `on_loaded` is called in another whenever a load has ended."""

    def __init__(self, max_bytes: int, max_host_bytes: int, on_loaded: Callable[[], None]) -> None:
        self._max_bytes = max_bytes
        self._max_host_bytes = max_host_bytes
        self._on_loaded = on_loaded
        self._entries: OrderedDict[Key, _Entry[M]] = OrderedDict()
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self.pinned: frozenset[Key] = frozenset()  # these make room last

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the single files behind the models that are in memory."""
        return tuple({name for key, entry in self._entries.items() if entry.is_loaded for name in key})

    @property
    def here(self) -> list[M]:
        """What is on the device."""
        return [entry.models.result() for entry in self._entries.values() if entry.is_here and entry.is_loaded]

    def take(self, key: Key, load: Callable[[], M], num_bytes: int, may_exceed: bool = False) -> M | None:
        """The models, in use until given back. None: they are not here; their load was begun if there was room for the
        `num_bytes` that they are taken to need, or without room if they may exceed the bound.

        Raises:
            Whatever the load raised.
        """
        entry = self._entries.get(key)
        if entry is None:
            self._begin(key, load, num_bytes, may_exceed)
            return None
        if not entry.models.done():
            return None
        if entry.models.exception() is not None:
            del self._entries[key]
        models = entry.models.result()
        entry.num_bytes = models.num_bytes
        self._entries.move_to_end(key)
        self._drop_copies(but_of=key)
        if not entry.is_here:
            self._fetch(entry, models, may_exceed)
            return None
        entry.num_users += 1
        return models

    def keep(self, key: Key, load: Callable[[], M], num_bytes: int) -> BaseException | None:
        """Begins to load pinned models, or brings them back, unless another pinned one would have to go. Answers why a
        load has failed."""
        entry = self._entries.get(key)
        if entry is None:
            self._begin(key, load, num_bytes, may_exceed=False, spared=self.pinned)
        elif entry.models.done() and (failure := entry.models.exception()) is not None:
            del self._entries[key]
            return failure
        elif entry.is_loaded:
            entry.num_bytes = entry.models.result().num_bytes
            if not entry.is_here:
                self._fetch(entry, entry.models.result(), may_exceed=False, spared=self.pinned)
        return None

    @property
    def failures(self) -> set[Key]:
        """The loads that failed and that nobody has heard of yet."""
        return {key for key, entry in self._entries.items() if entry.models.done() and not entry.is_loaded}

    def dismiss(self, failures: set[Key]) -> None:
        """Forgets those that nobody asked for since: they would take up room and fail whoever comes next."""
        for key in failures & self.failures:
            del self._entries[key]

    def give_back(self, key: Key) -> None:
        """Ends one use."""
        self._entries[key].num_users -= 1

    def __contains__(self, key: Key) -> bool:
        """Whether these models are on the device or on their way there."""
        return key in self._entries and self._entries[key].is_here

    def evict_unused(self) -> bool:
        """Makes as much room on the device as there is to be had; False: there is none."""
        unused = self._unused()
        for key in unused:
            self._evict(key)
        return bool(unused)

    def close(self) -> None:
        """Waits for the load on its way and ends the thread."""
        self._loader.shutdown(cancel_futures=True)

    def _begin(
        self, key: Key, load: Callable[[], M], num_bytes: int, may_exceed: bool, spared: frozenset[Key] = frozenset()
    ) -> None:
        """Reads the models, into the host's memory where the device has no room yet."""
        has_room = self._make_room(num_bytes, spared) or may_exceed

        def loaded() -> M:
            models = load()
            if has_room:
                models.enter()
            return models

        if has_room or num_bytes <= self._max_host_bytes:
            entry = _Entry(self._loader.submit(loaded), num_bytes, has_room, has_copy=self._max_host_bytes > 0)
            self._entries[key] = entry
            entry.models.add_done_callback(lambda _: self._on_loaded())

    def _fetch(self, entry: _Entry[M], models: M, may_exceed: bool, spared: frozenset[Key] = frozenset()) -> None:
        """Brings models from the host's memory, if there is room for them."""
        if self._make_room(entry.num_bytes, spared) or may_exceed:

            def entered() -> M:
                models.enter()
                return models

            entry.is_here = True
            entry.models = self._loader.submit(entered)
            entry.models.add_done_callback(lambda _: self._on_loaded())

    def _make_room(self, num_bytes: int, spared: frozenset[Key] = frozenset()) -> bool:
        here = [entry for entry in self._entries.values() if entry.is_here]
        unused = [key for key in self._unused() if key not in spared]
        needed = sum(entry.num_bytes for entry in here) + num_bytes - self._max_bytes
        if needed > sum(self._entries[key].num_bytes for key in unused) and len(here) > len(unused):
            return False
        for key in unused:
            if needed > 0:
                needed -= self._entries[key].num_bytes
                self._evict(key)
        return True

    def _unused(self) -> list[Key]:
        """In the order in which they make room."""
        unused = [
            key for key, entry in self._entries.items() if entry.is_here and entry.is_loaded and not entry.num_users
        ]
        return sorted(unused, key=self.pinned.__contains__)

    def _evict(self, key: Key) -> None:
        entry = self._entries[key]
        entry.models.result().leave()
        entry.is_here = False
        if not entry.has_copy:
            del self._entries[key]

    def _drop_copies(self, but_of: Key) -> None:
        """Gives up what exceeds the host's memory: of models on the device the copy, of others all, but for those that
        somebody waits for."""
        copies = [(key, entry) for key, entry in self._entries.items() if entry.has_copy and entry.is_loaded]
        excess = sum(entry.num_bytes for _, entry in copies) - self._max_host_bytes
        for key, entry in copies:
            if excess <= 0:
                break
            if key == but_of and not entry.is_here:
                continue
            excess -= entry.num_bytes
            entry.models.result().forget()
            entry.has_copy = False
            if not entry.is_here:
                del self._entries[key]
