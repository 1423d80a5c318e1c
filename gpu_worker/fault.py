"""Ends the process when the GPU has failed: after an error of the CUDA context every further call on it fails too."""

from __future__ import annotations

import os

import structlog
import torch

log = structlog.get_logger()

EXIT_DEVICE_FAILED = 4


def is_device_failure(error: BaseException) -> bool:
    """Whether the error came from the device itself. Too little memory is none: the next job may fit."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and str(error).startswith("CUDA error")
    )


def leave_if_device_failed(error: BaseException, job_id: str) -> None:
    """Ends the process at once, from any thread, where the error is the device's.

    Nothing is told to the queue: the lease is lost with the stream, and so the job goes to a worker that can run it.
    """
    if is_device_failure(error):
        log.critical("the GPU failed, this worker ends", job_id=job_id, reason=str(error).partition("\n")[0])
        os._exit(EXIT_DEVICE_FAILED)
