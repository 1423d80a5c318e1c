"""What a field may be, and from that the values that must pass and those that must not.

A case is a label, a value (MISSING for a field that is left out) and whether the request is a sound one with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MISSING = object()
_numbers = itertools.count(1)

Case = tuple[str, Any, bool]


def fresh(prefix: str = "t") -> str:
    """A name that nothing has yet."""
    return f"{prefix}{next(_numbers):06d}"


class Fresh:
    """In the place of a text that must be new in every request; `length` fills it up, `suffix` ends it."""

    def __init__(self, length: int = 0, suffix: str = "") -> None:
        self.length, self.suffix = length, suffix

    def __call__(self) -> str:
        return fresh().ljust(self.length - len(self.suffix), "x") + self.suffix


def made(value: Any) -> Any:
    """The value with a new name wherever one is wanted."""
    if isinstance(value, Fresh):
        return value()
    if isinstance(value, dict):
        return {key: made(entry) for key, entry in value.items()}
    return [made(entry) for entry in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class Text:
    """A text of one to `longest` characters. `good` and `bad` are further values; those of OK cases may be `Fresh`."""

    required: bool = True
    longest: int | None = None
    is_free: bool = False  # whether it may be of any length
    may_be_empty: bool = False
    good: tuple[Any, ...] = ()
    bad: tuple[Any, ...] = ()

    def cases(self) -> Iterator[Case]:
        """All of them."""
        yield from _absence(self.required)
        yield from ((f"wrong type {wrong!r}", wrong, False) for wrong in (5, True, [], {}, ["x"]))
        yield "empty", "", self.may_be_empty
        yield "NUL", "a\0b", False
        if self.longest is not None:
            yield "as long as may be", Fresh(self.longest), True
            yield "too long", Fresh(self.longest + 1), False
        yield "far too long", "x" * 100_000, self.longest is None and self.is_free
        yield from ((f"bad {value!r}"[:40], value, False) for value in self.bad)
        yield from ((f"good {number}", value, True) for number, value in enumerate(self.good))


@dataclass(frozen=True)
class Texts:
    """A list of texts."""

    entry: Any
    high: int
    low: int = 1
    required: bool = True
    bad: tuple[Any, ...] = ()
    # Whether `high` different entries make a sound request, and not only one that breaks no rule of the body.
    full_is_sound: bool = True

    def cases(self) -> Iterator[Case]:
        """All of them."""
        yield from _absence(self.required)
        yield from ((f"wrong type {wrong!r}", wrong, False) for wrong in (5, True, {}, [5], [[]], [{}], [True]))
        yield "empty", [], self.low == 0
        # NOTE: the transcoder takes one text for a list of one.
        yield "one text", self.entry, True
        yield "empty text", [""], False
        yield "NUL", ["a\0b"], False
        if self.full_is_sound:
            yield "as many as may be", [self.entry] * self.high, True
        yield "too many", [self.entry] * (self.high + 1), False
        yield from ((f"bad {value!r}"[:40], value, False) for value in self.bad)


@dataclass(frozen=True)
class Number:
    """A whole number."""

    low: int
    high: int
    required: bool = False

    def cases(self) -> Iterator[Case]:
        """All of them."""
        yield from _absence(self.required)
        yield from ((f"wrong type {wrong!r}", wrong, False) for wrong in ("x", True, [], {}, 1.5, 2**40, -(2**40)))
        yield "low", self.low, True
        yield "high", self.high, True
        yield "too low", self.low - 1, False
        yield "too high", self.high + 1, False


@dataclass(frozen=True)
class Flag:
    """True or false; true only where that is no other request altogether."""

    may_be_true: bool = True

    def cases(self) -> Iterator[Case]:
        """All of them."""
        yield from _absence(required=False)
        yield from ((f"wrong type {wrong!r}", wrong, False) for wrong in ("x", 5, [], {}))
        yield "false", False, True
        if self.may_be_true:
            yield "true", True, True


@dataclass(frozen=True)
class Object:
    """Free JSON."""

    required: bool = False

    def cases(self) -> Iterator[Case]:
        """All of them."""
        yield from _absence(self.required)
        yield from ((f"wrong type {wrong!r}", wrong, False) for wrong in ("x", 5, True, []))
        yield "empty", {}, True
        yield "free", {"message": "hello", "deep": [{"a": None, "b": 1.5}], "": ""}, True
        yield "NUL", {"a": "\0"}, False
        yield "too large", {"a": "x" * 100_000}, False


@dataclass(frozen=True)
class Cases:
    """A field of its own kind."""

    given: tuple[Case, ...]

    def cases(self) -> Iterator[Case]:
        """All of them."""
        yield from self.given


Kind = Text | Texts | Number | Flag | Object | Cases


def _absence(required: bool) -> Iterator[Case]:
    yield "missing", MISSING, not required
    yield "null", None, not required
