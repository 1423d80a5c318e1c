"""A1111-style payloads: JSON in, one checked object out. What is checked here is exactly what a worker runs.

Fields that are not listed are ignored, null means absent, `Infinity` is the largest float (original clients send it).
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from services.common.errors import InvalidArgument

MAX_BYTES = 64 * 1024 * 1024
MAX_IMAGES = 64
TASKS = ("txt2img",)


@dataclass(frozen=True)
class Sampler:
    """The noise schedules that a sampler can follow, and the one that `Automatic` means for it."""

    schedules: tuple[str, ...] = ("Uniform",)
    automatic: str = "Uniform"


_KARRAS = ("Uniform", "Karras", "Exponential", "Beta")
_ALL = ("Uniform", "Karras", "Exponential", "SGM Uniform", "Beta")
# What gpu_worker/samplers.py can run; a test keeps the two equal.
SAMPLERS = {
    "Euler": Sampler(_ALL),
    "Euler a": Sampler(("Uniform", "SGM Uniform")),
    "LMS": Sampler(_ALL),
    "Heun": Sampler(_ALL),
    "DPM2": Sampler(_ALL, "Karras"),
    "DPM2 a": Sampler(_ALL, "Karras"),
    "DPM++ 2S a": Sampler(_KARRAS, "Karras"),
    "DPM++ 2M": Sampler(_ALL, "Karras"),
    "DPM++ SDE": Sampler(_ALL, "Karras"),
    "DPM++ 2M SDE": Sampler(_ALL, "Exponential"),
    "DPM++ 2M SDE Heun": Sampler(_ALL, "Exponential"),
    "DPM++ 3M SDE": Sampler(_ALL, "Exponential"),
    "DPM fast": Sampler(),
    "DDIM": Sampler(),
    "PLMS": Sampler(),
    "UniPC": Sampler(),
    "LCM": Sampler(),
}
REFUSED_SAMPLERS = ("DPM adaptive", "Restart")
# What would change the picture and is not built yet; refused unless it has one of these harmless values.
_NOT_YET: dict[str, tuple[Any, ...]] = {
    "enable_hr": (False,),
    "restore_faces": (False,),
    "tiling": (False,),
    "s_churn": (0,),
    "refiner_checkpoint": ("", "None"),
}
_SEED_RANGE = 2**32
_LARGEST_EXACT_INTEGER = 2**53 - 1  # payloads travel as JSON numbers
# GPU-seconds of one step at 512x512. Only ratios between jobs matter to the queue, so any constant will do.
_STEP_SECONDS = 0.05


class Txt2Img(BaseModel):
    """The fields of a txt2img payload, with A1111's defaults."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = Field(-1, ge=-1, le=_LARGEST_EXACT_INTEGER)
    subseed: int = Field(-1, ge=-1, le=_LARGEST_EXACT_INTEGER)
    subseed_strength: float = Field(0.0, ge=0, le=1)
    seed_resize_from_w: int = Field(0, ge=-1, le=4096)
    seed_resize_from_h: int = Field(0, ge=-1, le=4096)
    sampler_name: str = "Euler"
    steps: int = Field(50, ge=1, le=150)
    cfg_scale: float = Field(7.0, ge=0, le=30)
    width: int = Field(512, ge=64, le=4096, multiple_of=8)
    height: int = Field(512, ge=64, le=4096, multiple_of=8)
    batch_size: int = Field(1, ge=1, le=8)
    n_iter: int = Field(1, ge=1, le=MAX_IMAGES)
    eta: float = Field(0.0, ge=0, le=1)
    # The layer of SD1.5's text encoder that is read, from its end: `override_settings.CLIP_stop_at_last_layers`.
    clip_skip: int = Field(1, ge=1, le=12)
    # Not A1111's: the job shares no step with others, and its picture repeats bit for bit.
    exclusive: bool = False

    @model_validator(mode="before")
    @classmethod
    def _one_spelling(cls, fields: dict[str, Any]) -> dict[str, Any]:
        given = {name: value for name, value in fields.items() if value is not None}
        for name, harmless in _NOT_YET.items():
            if name in given and given[name] not in harmless:
                raise ValueError(f"{name} {_shown(given[name])} is not supported yet; leave it out")
        given["sampler_name"] = _sampler(given)
        settings = given.get("override_settings")
        if isinstance(settings, dict) and settings.get("CLIP_stop_at_last_layers") is not None:
            given["clip_skip"] = settings["CLIP_stop_at_last_layers"]
        return given

    @model_validator(mode="after")
    def _storable(self) -> Txt2Img:
        if self.batch_size * self.n_iter > MAX_IMAGES:
            raise ValueError(
                f"batch_size {self.batch_size} times n_iter {self.n_iter} is {self.num_images} images; "
                f"at most {MAX_IMAGES} are possible"
            )
        for name, text in (("prompt", self.prompt), ("negative_prompt", self.negative_prompt)):
            # Neither JSONB nor protobuf can carry these; JSON's escapes can.
            if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ValueError(f"{name} contains a character that is no text (U+0000 or half of a surrogate pair)")
        return self

    @property
    def num_images(self) -> int:
        """How many pictures the job makes."""
        return self.batch_size * self.n_iter

    @property
    def cost_seconds(self) -> float:
        """The job's estimated GPU time, up to a constant factor."""
        return _STEP_SECONDS * self.steps * self.num_images * self.width * self.height / (512 * 512)


@dataclass(frozen=True)
class CheckedPayload:
    """A payload ready to run: as plain values and as bytes, with what the queue needs to know of it."""

    fields: dict[str, Any]
    encoded: bytes
    num_images: int
    cost_seconds: float

    @property
    def sha256(self) -> str:
        """Of the encoded form, in hex."""
        return hashlib.sha256(self.encoded).hexdigest()


def check_json(text: str) -> None:
    """Checks that a text is JSON as Python reads it, `Infinity` and `NaN` included.

    Raises:
        InvalidArgument: it is not.
    """
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidArgument("payload_string must be valid json string") from None


def check_payload(content: bytes | str, task_type: str, job_id: str) -> CheckedPayload:
    """Parses and checks a payload; a seed of -1 becomes a number that only depends on the job's id.

    Raises:
        InvalidArgument: the message names each wrong field with its value and what is possible.
    """
    if task_type not in TASKS:
        raise InvalidArgument(f"task type {task_type} is not supported yet; possible: {', '.join(TASKS)}")
    try:
        payload = Txt2Img.model_validate(_parse(content))
    except ValidationError as error:
        raise InvalidArgument("; ".join(_sentence(problem) for problem in error.errors())) from None
    payload.seed = seed_of(job_id) if payload.seed == -1 else payload.seed
    payload.subseed = seed_of(f"{job_id} subseed") if payload.subseed == -1 else payload.subseed
    fields = payload.model_dump()
    encoded = json.dumps(fields, ensure_ascii=False).encode()
    return CheckedPayload(fields, encoded, payload.num_images, payload.cost_seconds)


def seed_of(job_id: str) -> int:
    """The random seed of a job: the same at every attempt, so that a repeated job gives the same picture."""
    return int.from_bytes(hashlib.sha256(job_id.encode()).digest(), "big") % _SEED_RANGE


def _parse(content: bytes | str) -> dict[str, Any]:
    try:
        parsed = json.loads(content, parse_constant=_constant, parse_float=_float)
    except RecursionError:
        raise InvalidArgument("the payload is nested too deeply") from None
    except ValueError as error:
        raise InvalidArgument(f"the payload is not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise InvalidArgument("the payload is not a JSON object")
    return parsed


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN is not a number that can be used")
    return -sys.float_info.max if name.startswith("-") else sys.float_info.max


def _float(digits: str) -> float:
    return max(-sys.float_info.max, min(sys.float_info.max, float(digits)))


def _sampler(fields: dict[str, Any]) -> str:
    """The sampler and its schedule as one name, such as `DPM++ 2M Karras`: what A1111 1.8 labels them, from whichever
    fields a client uses. Without a `scheduler` a bare name means the uniform schedule, as it did there."""
    given, scheduler = fields.get("sampler_name") or fields.get("sampler_index") or "Euler", fields.get("scheduler")
    name, ending = _split(given)
    if not isinstance(name, str) or name not in SAMPLERS:
        problem = "cannot be run here" if name in REFUSED_SAMPLERS else "is not known"
        raise ValueError(f"sampler_name {_shown(given)} {problem}; possible: {', '.join(SAMPLERS)}")
    sampler = SAMPLERS[name]
    possible = {known.lower(): known for known in sampler.schedules}
    possible["automatic"] = sampler.automatic
    wanted = ending or scheduler or "Uniform"
    schedule = possible.get(wanted.lower()) if isinstance(wanted, str) else None
    if schedule is None:
        choice = ", ".join(("Automatic", *sampler.schedules))
        raise ValueError(f"scheduler {_shown(wanted)} does not go with sampler_name {_shown(name)}; possible: {choice}")
    return name if schedule == "Uniform" else f"{name} {schedule}"


def _split(given: Any) -> tuple[Any, str]:
    """A sampler's own name, and the schedule that a name ends in or an empty text."""
    if not isinstance(given, str):
        return given, ""
    samplers = {known.lower(): known for known in (*SAMPLERS, *REFUSED_SAMPLERS)}
    name = given.strip().lower()
    for schedule in (*_ALL, "Automatic"):
        stem = name.removesuffix(f" {schedule.lower()}")
        if stem in samplers and stem != name:
            return samplers[stem], schedule
    return samplers.get(name, given), ""


def _sentence(problem: Any) -> str:
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    name, value = str(problem["loc"][0]), _shown(problem["input"])
    if problem["type"] in {"greater_than_equal", "less_than_equal"}:
        rules = Txt2Img.model_json_schema()["properties"][name]
        return f"{name} {value} is out of range: {rules['minimum']} to {rules['maximum']} is possible"
    if problem["type"] == "multiple_of":
        return f"{name} {value} is not a multiple of {problem['ctx']['multiple_of']}"
    return f"{name} {value}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 80 else f"{text[:77]}..."
