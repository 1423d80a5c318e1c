"""What a prompt says beside its words, in A1111's syntax: networks `<lora:name:1>`, several texts joined by AND, and
texts that change on the way (`[from:to:0.5]`, `[one|other]`). Weights and BREAK are read where text becomes tokens.

Written from its behaviour, not its code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from services.common.payloads.showing import shown

MAX_TEXTS = 8
_TAG = re.compile(r"<(\w+):([^<>]+)>")
_AND = re.compile(r"\bAND\b")
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
_WEIGHTED = re.compile(rf"(?P<text>.*?)\s*:\s*(?P<weight>{_NUMBER})\s*", re.DOTALL)
_PAIRS = {"[": "]", "(": ")"}


@dataclass(frozen=True)
class Lora:
    """A LoRA by the stem of its file, and how much of it changes the text encoders and the UNet."""

    name: str
    text_scale: float = 1.0
    unet_scale: float = 1.0


@dataclass(frozen=True)
class Prompt:
    """A prompt without its tags, and what they asked for. `ignored` are tags of what cannot be had."""

    text: str
    loras: tuple[Lora, ...] = ()
    ignored: tuple[str, ...] = ()


def read(prompt: str) -> Prompt:
    """Takes the tags out of a prompt.

    Raises:
        ValueError: a LoRA's scale is no number.
    """
    loras, ignored = [], []
    for match in _TAG.finditer(prompt):
        kind, arguments = match.groups()
        if kind == "lora":
            loras.append(_lora(match.group(), arguments.split(":")))
        else:
            ignored.append(match.group())
    return Prompt(_TAG.sub("", prompt), tuple(loras), tuple(ignored))


def joined_by_and(text: str) -> list[tuple[str, float]]:
    """The texts between ANDs, each with its weight, 1 unless it ends in a number (`a cat :0.5 AND a dog`)."""
    found = []
    for part in _AND.split(text):
        match = _WEIGHTED.fullmatch(part)
        found.append((match["text"], float(match["weight"])) if match else (part, 1.0))
    return found


def at_step(text: str, step: int, num_steps: int, steps_before: int = 0) -> str:
    """The text that is read in a step, counted from 0. `[a:b:0.5]` is a up to the step that this part of all makes, or
    with a whole number up to that one, and b behind it; `[a|b]` alternates. Other brackets stay. In a second pass,
    after `steps_before`, parts count from 1 to 2.

    A1111 (modules/prompt_parser.py) counts texts from 1 and looks them up by the sampler's step, which it counts from
    0: a text that ends at n holds for the steps 0 to n, one more than it says, and the first step of an alternation
    comes twice. Of samplers with two evaluations in a step it counts the evaluations; here it is always steps.
    """
    resolved, position = [], 0
    while position < len(text):
        letter = text[position]
        end = _closing(text, position) if letter == "[" else None
        if end is not None:
            inner = text[position + 1 : end]
            chosen = _chosen(inner, step, num_steps, steps_before)
            found = at_step(inner if chosen is None else chosen, step, num_steps, steps_before)
            resolved.append(f"[{found}]" if chosen is None else found)
            position = end + 1
        else:
            length = 2 if letter == "\\" else 1
            resolved.append(text[position : position + length])
            position += length
    return "".join(resolved)


def _lora(tag: str, arguments: list[str]) -> Lora:
    named = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    name, *positional = [argument for argument in arguments if "=" not in argument]
    text_scale = named.get("te", positional[0] if positional else "1")
    unet_scale = named.get("unet", positional[1] if positional[1:] else text_scale)
    return Lora(name.strip(), _number(tag, text_scale), _number(tag, unet_scale))


def _number(tag: str, text: str) -> float:
    if not re.fullmatch(_NUMBER, text.strip()):
        raise ValueError(f"{tag}: {shown(text)} is no number; possible: <lora:name:1> or <lora:name:0.5:1>")
    return float(text)


def _chosen(inner: str, step: int, num_steps: int, steps_before: int) -> str | None:
    """What stands for the inside of square brackets in that step; None: they only weigh."""
    alternatives = _split(inner, "|")
    if len(alternatives) > 1:
        return alternatives[max(step - 1, 0) % len(alternatives)]
    parts = _split(inner, ":")
    if len(parts) not in {2, 3} or not re.fullmatch(rf"\s*{_NUMBER}\s*", parts[-1]):
        return None
    when = float(parts[-1])
    part_before = 1 if steps_before else 0
    until = int((when - part_before) * num_steps if "." in parts[-1] else when - steps_before)
    before, after = parts[:2] if len(parts) == 3 else ("", parts[0])
    return before if until >= 1 and step <= until else after


def _closing(text: str, start: int) -> int | None:
    """Where the bracket that opens at `start` is closed."""
    return next((index for index, _, depth in _walk(text, start) if depth == 0), None)


def _split(text: str, separator: str) -> list[str]:
    """Split where no bracket is open."""
    cuts = [index for index, letter, depth in _walk(text, 0) if letter == separator and depth == 0]
    starts = [0, *(cut + 1 for cut in cuts)]
    return [text[start:end] for start, end in zip(starts, [*cuts, len(text)], strict=True)]


def _walk(text: str, start: int) -> Iterator[tuple[int, str, int]]:
    """Letters that are not escaped, each with how many brackets are open behind it."""
    opened: list[Any] = []
    index = start
    while index < len(text):
        letter = text[index]
        if letter == "\\":
            index += 2
            continue
        if letter in _PAIRS:
            opened.append(_PAIRS[letter])
        elif opened and letter == opened[-1]:
            opened.pop()
        yield index, letter, len(opened)
        index += 1
