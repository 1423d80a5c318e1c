"""What a prompt says beside its words, in A1111's syntax: comments, networks `<lora:name:1>`, several texts joined by
AND, and texts that change on the way (`[from:to:0.5]`, `[one|other]`). Weights and BREAK are read where text becomes
tokens.

Written from its behaviour, not its code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from services.common.payloads.showing import shown

MAX_TEXTS = 8
MAX_NETWORKS = 100
MAX_CHARACTERS = 10_000
# None of these, nor what reads with them, takes a time that grows with the square of a text: others are served too.
_COMMENT = re.compile(r"#[^\n]*")
_TAG = re.compile(r"<(\w+):([^<>]+)>")
_AND = re.compile(r"\bAND\b")
_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)"
_WEIGHT = re.compile(rf"\s*{_NUMBER}\s*")
_PAIRS = {"[": "]", "(": ")"}
LORA_TAG, HYPERNETWORK_TAG = "lora", "hypernet"
# What tags of networks begin with, and the kind that each means.
_NETWORKS = {"lora": LORA_TAG, "lyco": LORA_TAG, "hypernet": HYPERNETWORK_TAG}
_SCALES = ("te", "unet")  # by name; by place they are the second and the third


@dataclass(frozen=True)
class NetworkTag:
    """A LoRA or a hypernetwork by the stem of its file, and how much of it changes the text encoders and the UNet.
    There is nothing of a hypernetwork for text encoders."""

    name: str
    text_scale: float = 1.0
    unet_scale: float = 1.0
    kind: str = LORA_TAG

    def __str__(self) -> str:
        return f"<{self.kind}:{self.name}>"


@dataclass(frozen=True)
class Prompt:
    """A prompt without its tags, and what they asked for. `ignored` names what cannot be had of them."""

    text: str
    networks: tuple[NetworkTag, ...] = ()
    ignored: tuple[str, ...] = ()


def without_comments(prompt: str) -> str:
    """A prompt without what stands behind a `#`, to the end of its line."""
    return _COMMENT.sub("", prompt)


def read(prompt: str) -> Prompt:
    """Takes the tags out of a prompt.

    Raises:
        ValueError: a network's scale is no number.
    """
    networks, ignored = [], []
    for match in _TAG.finditer(prompt):
        kind, arguments = match.groups()
        if kind in _NETWORKS:
            networks.append(_network(match.group(), _NETWORKS[kind], arguments.split(":")))
            if _has_more(arguments.split(":")):
                ignored.append(f"{match.group()}: all but its scales")
        else:
            ignored.append(match.group())
    return Prompt(_TAG.sub("", prompt), tuple(networks), tuple(ignored))


def joined_by_and(text: str) -> list[tuple[str, float]]:
    """The texts between ANDs, each with its weight, 1 unless it ends in a number (`a cat :0.5 AND a dog`)."""
    found = []
    for part in _AND.split(text):
        before, colon, weight = part.rpartition(":")
        found.append((before.rstrip(), float(weight)) if colon and _WEIGHT.fullmatch(weight) else (part, 1.0))
    return found


def at_step(text: str, step: int, num_steps: int, steps_before: int = 0) -> str:
    """The text that is read in a step, counted from 0. `[a:b:0.5]` is a up to the step that this part of all makes, or
    with a whole number up to that one, and b behind it; `[a|b]` alternates. Other brackets stay. In a second pass,
    after `steps_before`, parts count from 1 to 2.

    A1111 (modules/prompt_parser.py) counts texts from 1 and looks them up by the sampler's step, which it counts from
    0: a text that ends at n holds for the steps 0 to n, one more than it says, and the first step of an alternation
    comes twice. Of samplers with two evaluations in a step it counts the evaluations; here it is always steps.
    """
    brackets = _brackets(text)
    resolved = []
    spans = [(0, len(text))]  # that are still to be read, the next one last
    while spans:
        start, end = spans.pop()
        opening = next((index for index in _openings(text, start, end) if index in brackets), end)
        resolved.append(text[start:opening])
        if opening == end:
            continue
        closing, cuts = brackets[opening]
        chosen = _chosen(text, [opening, *cuts, closing], step, num_steps, steps_before)
        if chosen is None:  # the brackets only weigh
            resolved.append("[")
            spans += [(closing + 1, end), (closing, closing + 1), (opening + 1, closing)]
        else:
            spans += [(closing + 1, end), chosen]
    return "".join(resolved)


def _network(tag: str, kind: str, arguments: list[str]) -> NetworkTag:
    named = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    name, *positional = [argument for argument in arguments if "=" not in argument]
    text_scale = named.get("te", positional[0] if positional else "1")
    unet_scale = named.get("unet", positional[1] if positional[1:] else text_scale)
    return NetworkTag(name.strip(), _number(tag, text_scale), _number(tag, unet_scale), kind)


def _has_more(arguments: list[str]) -> bool:
    """Whether a tag of a network says more than its scales, as a rank or the weights of blocks."""
    names = [argument.split("=", 1)[0] for argument in arguments if "=" in argument]
    return len(arguments) - len(names) > 1 + len(_SCALES) or any(name not in _SCALES for name in names)


def _number(tag: str, text: str) -> float:
    if not _WEIGHT.fullmatch(text):
        raise ValueError(f"{tag}: {shown(text)} is no number; possible: <lora:name:1> or <lora:name:0.5:1>")
    return float(text)


def _chosen(text: str, marks: list[int], step: int, num_steps: int, steps_before: int) -> tuple[int, int] | None:
    """Where what stands for a pair of square brackets in that step begins and ends; None: they only weigh. `marks` are
    the places of the brackets and of what separates parts between them."""
    if alternatives := [mark for mark in marks[1:-1] if text[mark] == "|"]:
        marks = [marks[0], *alternatives, marks[-1]]
    parts = [(before + 1, after) for before, after in pairwise(marks)]
    if alternatives:
        return parts[max(step - 1, 0) % len(parts)]
    if len(parts) not in {2, 3} or not _WEIGHT.fullmatch(text, *parts[-1]):
        return None
    said = text[slice(*parts[-1])]
    when = float(said)
    part_before = 1 if steps_before else 0
    until = (when - part_before) * num_steps if "." in said else when - steps_before
    before, after = parts[:2] if len(parts) == 3 else ((0, 0), parts[0])
    return before if until >= max(step, 1) else after


def _openings(text: str, start: int, end: int) -> Iterator[int]:
    """Where square brackets stand."""
    while (start := text.find("[", start, end)) >= 0:
        yield start
        start += 1


def _brackets(text: str) -> dict[int, tuple[int, list[int]]]:
    """By the place of each square bracket that is closed: where that is, and what separates parts directly between."""
    found: dict[int, tuple[int, list[int]]] = {}
    opened: list[tuple[int, str, list[int]]] = []  # place, what closes it, separators
    letters = iter(enumerate(text))
    for index, letter in letters:
        if letter == "\\":
            next(letters, None)
        elif letter in _PAIRS:
            opened.append((index, _PAIRS[letter], []))
        elif opened and letter == opened[-1][1]:
            opening, closed_by, cuts = opened.pop()
            if closed_by == "]":
                found[opening] = index, cuts
        elif opened and letter in "|:":
            opened[-1][2].append(index)
    return found
