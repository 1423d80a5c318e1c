"""Ends the process when the GPU has failed, after an error of the CUDA context, as every further call on it fails too;
or when the engine is broken or stuck."""

from __future__ import annotations

import os

import structlog
import torch

log = structlog.get_logger()

EXIT_DEVICE_FAILED = 4
EXIT_ENGINE_BROKEN = 6


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


def leave_broken(error: BaseException) -> None:
    """Ends the process at once, from any thread, after an error that left the engine without its thread: what that held
    nobody could give back, and the process would look alive. Its jobs go back to the queue with the stream."""
    leave_if_device_failed(error, "")
    log.critical("the engine broke, this worker ends", exc_info=error)
    os._exit(EXIT_ENGINE_BROKEN)


def leave_stuck(seconds: float) -> None:
    """Ends the process at once, from any thread, where the engine hangs. Its jobs go back to the queue with the stream,
    whose leases are renewed otherwise for as long as the process lives."""
    log.critical("nothing has moved in the engine, this worker ends", seconds=seconds)
    os._exit(EXIT_ENGINE_BROKEN)
