"""A job: where it is in its life. What it asks for is in `payloads`.

A job waits, is fetched (payload and models), runs in the engine, and uploads its results. It ends once: done or failed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from gpu_worker.audience import Audience

if TYPE_CHECKING:
    from esd.worker.v1 import worker_pb2

T = TypeVar("T")

INTERNAL = "an internal error occurred in the worker; its log has the details under this job's id"


class JobError(Exception):
    """A job cannot be done. The message is one sentence for its owner."""


class NoMemory(JobError):
    """The device had not enough memory for it, with what else was there."""


class JobCancelled(Exception):
    """A job was told to stop."""


class Job:
    """One job of either door. `emit` receives its events on the event loop, the last one included."""

    def __init__(self, spec: worker_pb2.JobSpec, emit: Callable[[worker_pb2.JobEvent], None]) -> None:
        self.spec = spec
        self.emit = emit
        self.taken_at = time.monotonic()
        self.cancelled = False
        self.has_uploaded = False  # or begun to
        self.audience = Audience()
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
