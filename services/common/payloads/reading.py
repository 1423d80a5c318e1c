"""From JSON to a checked payload, and from what pydantic found wrong to sentences for the client."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from services.common.errors import InvalidArgument
from services.common.payloads import plots
from services.common.payloads.base import Payload
from services.common.payloads.extras import RemoveBackground, UpscaleMany, UpscaleOne
from services.common.payloads.generation import Generation
from services.common.payloads.img2img import Img2Img
from services.common.payloads.showing import is_text, path_of, sentence
from services.common.payloads.txt2img import Txt2Img

TASKS: dict[str, type[Payload]] = {
    "txt2img": Txt2Img,
    "img2img": Img2Img,
    "extra-single-image": UpscaleOne,
    "extra-batch-images": UpscaleMany,
    "rembg": RemoveBackground,
}
_SEED_RANGE = 2**32


def parse(content: bytes | str) -> dict[str, Any]:
    """JSON as original clients write it: `Infinity` is the largest float, `NaN` an error (contract 10.1).

    Raises:
        InvalidArgument: it is no JSON object.
    """
    try:
        parsed = json.loads(content, parse_constant=_constant, parse_float=_float)
    except RecursionError:
        raise InvalidArgument("the payload is nested too deeply") from None
    except ValueError as error:
        raise InvalidArgument(f"the payload is not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise InvalidArgument("the payload is not a JSON object")
    return parsed


def check(task_type: str, fields: dict[str, Any], job_id: str) -> Payload:
    """The request in a payload. Null means absent, and a seed of -1 becomes a number that only depends on the job's id.
    The checked form, `model_dump()` of the answer, gives the same answer again. It is checked as strictly: a client
    may send one too, as `esd verify` does.

    Raises:
        InvalidArgument: the message names each wrong field with its value and what is possible.
    """
    task = TASKS.get(task_type)
    if task is None:
        raise InvalidArgument(f"task type {task_type} is not known; possible: {', '.join(TASKS)}")
    request = _validated(task, fields)
    for path, text in _texts(request.model_dump()):
        if not is_text(text):
            raise InvalidArgument(f"{path} contains a character that is no text (U+0000 or half of a surrogate pair)")
    if not isinstance(request, Generation):
        return request
    texts = {"seed": job_id, "subseed": f"{job_id} subseed"}
    seeds = {name: seed_of(text) for name, text in texts.items() if getattr(request, name) == -1}
    request = request.model_copy(update=seeds)
    for name, cell in request.cell_fields():
        try:
            _validated(task, cell)
        except InvalidArgument as error:
            raise InvalidArgument(f"{plots.SCRIPT}, {name}: {error}") from None
    return request


def _validated(task: type[Payload], fields: dict[str, Any]) -> Payload:
    try:
        return task.model_validate(fields)
    except ValidationError as error:
        raise InvalidArgument("; ".join(sentence(problem, task) for problem in error.errors())) from None


def _texts(value: Any, *path: str | int) -> Iterator[tuple[str, str]]:
    """The texts in a value, each with where it is."""
    if isinstance(value, str):
        yield path_of(path), value
    elif isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(inner, *path, name)


def seed_of(job_id: str) -> int:
    """The random seed of a job: the same at every attempt, so that a repeated job gives the same picture."""
    return int.from_bytes(hashlib.sha256(job_id.encode()).digest(), "big") % _SEED_RANGE


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN is not a number that can be used")
    return -sys.float_info.max if name.startswith("-") else sys.float_info.max


def _float(digits: str) -> float:
    return max(-sys.float_info.max, min(sys.float_info.max, float(digits)))
