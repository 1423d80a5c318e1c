"""How a value of a payload looks in a sentence about it, and the sentence on what pydantic found wrong with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

_MAX_LETTERS = 80
OFF = (False, 0, "", "None", "none", "false", "False")  # how clients write that a field says nothing


def shown(value: Any) -> str:
    """As JSON, cut where it would fill the sentence; a date of TOML as text."""
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= _MAX_LETTERS else f"{text[: _MAX_LETTERS - 3]}..."


def says(value: Any) -> bool:
    """Whether a client might miss what a field with that value asks for."""
    if isinstance(value, list):
        return any(item not in (None, *OFF) for item in value)
    return value not in (None, *OFF, {})


def is_text(value: str) -> bool:
    """Whether JSONB and protobuf can carry it; JSON's escapes can write more."""
    # Whether it is ASCII is known without a look at each letter, of which pictures have many.
    return "\0" not in value and (value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value))


def sentence(problem: Any, model: type[BaseModel]) -> str:
    """What is wrong with a field, of which value, and what is possible; `problem` is one of a ValidationError."""
    location = problem["loc"]
    if problem["type"] == "value_error":  # it names its field, but not the object that this lies in
        outer = location[:-1] if location and isinstance(location[-1], str) else location
        return f"{path_of(outer)}: {problem['ctx']['error']}" if outer else str(problem["ctx"]["error"])
    name, value = path_of(location), shown(problem["input"])
    if problem["type"] == "missing":
        return f"{name} is missing"
    if problem["type"] in {"greater_than_equal", "less_than_equal"} and (possible := _range(model, location)):
        return f"{name} {value} is out of range: {possible} is possible"
    if problem["type"] == "multiple_of":
        return f"{name} {value} is not a multiple of {problem['ctx']['multiple_of']}"
    if problem["type"] in {"model_type", "model_attributes_type"}:
        return f"{name} {value}: an object is wanted"
    said = problem["msg"].replace(" after validation", "")
    return f"{name} {value}: {said[:1].lower()}{said[1:]}"


def path_of(location: Sequence[str | int]) -> str:
    """Where a field lies, as in `controlnet[0].model`."""
    first, *inner = location
    return f"{first}{''.join(f'[{part}]' if isinstance(part, int) else f'.{part}' for part in inner)}"


def _range(model: type[BaseModel], path: Sequence[str | int]) -> str:
    """The bounds of a field that has both; it may lie in an object of a list."""
    whole = model.model_json_schema()
    rules: dict[str, Any] = whole
    for part in path:
        rules = rules["items"] if isinstance(part, int) else rules["properties"][part]
        if "anyOf" in rules:  # a field that may also be null
            rules = rules["anyOf"][0]
        if "$ref" in rules:
            rules = whole["$defs"][rules["$ref"].rpartition("/")[2]]
    return f"{rules['minimum']} to {rules['maximum']}" if {"minimum", "maximum"} <= rules.keys() else ""
