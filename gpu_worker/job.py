"""A job: the request that a payload makes (contract 10.4) and where the job is in its life.

A job waits, is fetched (payload and models), runs in the engine, and uploads its results. It ends once: done or failed.
"""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Self, TypeVar
from uuid import NAMESPACE_OID, UUID, uuid5

from google.protobuf.struct_pb2 import Struct, Value

from esd.worker.v1 import worker_pb2

T = TypeVar("T")

INTERNAL = "an internal error occurred in the worker; its log has the details under this job's id"
MAX_STEPS = 1000
MAX_SIZE = 8192
MAX_PIXELS = 4096 * 4096
MAX_IMAGES = 100


class JobError(Exception):
    """A job cannot be done. The message is one sentence for its owner."""


class JobCancelled(Exception):
    """A job was told to stop."""


class Job:
    """One job of either door. `emit` receives its events on the event loop, the last one included."""

    def __init__(self, spec: worker_pb2.JobSpec, emit: Callable[[worker_pb2.JobEvent], None]) -> None:
        self.spec = spec
        self.emit = emit
        self.cancelled = False
        self._stage: asyncio.Future[Any] | None = None

    @property
    def id(self) -> str:
        """The job's id."""
        return str(self.spec.job_id)

    def cancel(self) -> None:
        """Tells the job to stop. What it is doing is interrupted, in the engine within one denoising step."""
        self.cancelled = True
        if self._stage is not None:
            self._stage.cancel()

    async def stage(self, work: Coroutine[Any, Any, T]) -> T:
        """Does a part of the job that cancel() interrupts.

        Raises:
            JobCancelled: the job was told to stop.
        """
        if self.cancelled:
            work.close()
            raise JobCancelled
        self._stage = stage = asyncio.ensure_future(work)
        try:
            return await stage
        except asyncio.CancelledError:
            if self.cancelled:
                raise JobCancelled from None
            raise
        finally:
            self._stage = None


@dataclass(frozen=True)
class Txt2Img:
    """What a txt2img payload asks for. Sizes are in pixels; those of `seed_resize_from` are used where both are > 0."""

    prompt: str
    negative_prompt: str
    sampler_name: str
    scheduler: str
    steps: int
    cfg_scale: float
    width: int
    height: int
    seed: int
    subseed: int
    subseed_strength: float
    seed_resize_from_w: int
    seed_resize_from_h: int
    batch_size: int
    n_iter: int
    eta: float
    clip_skip: int
    # Shares no UNet call with other jobs, so that the picture repeats bit for bit on the same device and versions.
    exclusive: bool

    @property
    def is_guided(self) -> bool:
        """Whether the negative prompt counts: at a guidance scale of 1 or less it has no row."""
        return self.cfg_scale > 1

    def seed_of(self, image: int) -> int:
        """The seed of an image: those of a variation share one, and differ in their subseeds."""
        return self.seed if self.subseed_strength else self.seed + image

    def subseed_of(self, image: int) -> int:
        """The subseed of an image."""
        return self.subseed + image

    @property
    def num_pixels(self) -> int:
        """Pixels of a denoising step, over all its rows."""
        return self.width * self.height * self.batch_size * (2 if self.is_guided else 1)

    @property
    def num_images(self) -> int:
        """Images over all batches."""
        return self.batch_size * self.n_iter

    @classmethod
    def from_payload(cls, payload: dict[str, Any], job_id: str) -> Self:
        """Reads a payload; what is absent or null has A1111's default.

        Raises:
            JobError: a value is of the wrong type or out of bounds; the message names field and value.
        """
        read = _Reader(payload)
        seed, subseed = (read.integer(name, -1, -1, 2**63 - MAX_IMAGES) for name in ("seed", "subseed"))
        request = cls(
            prompt=read.text("prompt", ""),
            negative_prompt=read.text("negative_prompt", ""),
            sampler_name=read.text("sampler_name", "") or read.text("sampler_index", "") or "Euler",
            scheduler=read.text("scheduler", ""),
            steps=read.integer("steps", 50, 1, MAX_STEPS),
            cfg_scale=read.number("cfg_scale", 7.0),
            width=read.size("width"),
            height=read.size("height"),
            # The same number for every try of the job.
            seed=seed if seed >= 0 else _uuid(job_id).int % 2**32,
            subseed=subseed if subseed >= 0 else _uuid(f"{job_id} subseed").int % 2**32,
            subseed_strength=read.number("subseed_strength", 0.0),
            seed_resize_from_w=read.integer("seed_resize_from_w", 0, -1, MAX_SIZE),
            seed_resize_from_h=read.integer("seed_resize_from_h", 0, -1, MAX_SIZE),
            batch_size=read.integer("batch_size", 1, 1, MAX_IMAGES),
            n_iter=read.integer("n_iter", 1, 1, MAX_IMAGES),
            eta=read.number("eta", 0.0),
            clip_skip=read.integer("clip_skip", 1, 1, 12),
            exclusive=read.flag("exclusive"),
        )
        if request.num_images > MAX_IMAGES:
            raise JobError(f"batch_size * n_iter is {request.num_images}; at most {MAX_IMAGES} images are possible")
        if request.width * request.height > MAX_PIXELS:
            raise JobError(f"{request.width}x{request.height} has too many pixels; at most {MAX_PIXELS} are possible")
        return request


class _Reader:
    """Typed access to a payload's fields."""

    def __init__(self, payload: dict[str, Any]) -> None:
        self._payload = payload

    def text(self, name: str, default: str) -> str:
        value = self._payload.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise JobError(f"{name} must be text, not {value!r}")
        return value

    def number(self, name: str, default: float) -> float:
        value = self._payload.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise JobError(f"{name} must be a number, not {value!r}")
        return float(value)

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        value = self._payload.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(self.number(name, 0)):
            raise JobError(f"{name} must be a whole number, not {value!r}")
        if not low <= value <= high:
            raise JobError(f"{name} is {int(value)}; it must be from {low} to {high}")
        return int(value)

    def flag(self, name: str) -> bool:
        value = self._payload.get(name)
        if value is not None and not isinstance(value, bool):
            raise JobError(f"{name} must be true or false, not {value!r}")
        return bool(value)

    def size(self, name: str) -> int:
        value = self.integer(name, 512, 8, MAX_SIZE)
        if value % 8:
            raise JobError(f"{name} is {value}; it must be a multiple of 8")
        return value


def to_python(value: Struct | Value) -> Any:
    """A Struct as plain Python. Whole numbers become int, which JSON and A1111's readers expect; infinity becomes the
    largest float, as the contract has it (10.1)."""
    if isinstance(value, Struct):
        return {key: to_python(item) for key, item in value.fields.items()}
    match value.WhichOneof("kind"):
        case "number_value":
            return _plain_number(value.number_value)
        case "list_value":
            return [to_python(item) for item in value.list_value.values]
        case "struct_value":
            return to_python(value.struct_value)
        case "null_value" | None:
            return None
        case kind:
            return getattr(value, kind)


def _plain_number(number: float) -> int | float:
    if math.isinf(number):
        return math.copysign(sys.float_info.max, number)
    return int(number) if number.is_integer() and abs(number) < 2**63 else number


def _uuid(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        return uuid5(NAMESPACE_OID, text)
